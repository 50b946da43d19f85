// The attention of attention.h as a handler of XLA's foreign function interface.

#include "attention.h"

#include "arrays.h"

namespace collab_jax {
namespace {

// q [*lead, B, T, N, K] scaled; k, v [*lead, B, H, S, K]; mask [*lead, B, T, S]; first,
// last [*lead]. Result [*lead, B, T, N * K].
ffi::Error attend(ffi::ThreadPool pool, int32_t set, float cap, ffi::AnyBuffer q,
                  ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer mask,
                  ffi::AnyBuffer first, ffi::AnyBuffer last,
                  ffi::Result<ffi::AnyBuffer> out) {
  if (!supports(Set(set))) return wrong("this processor lacks the instruction set");
  if (q.dimensions().size() < 4) return wrong("queries are not [B, T, N, K]");
  const size_t lead = q.dimensions().size() - 4;
  const Led queries{q.dimensions(), lead}, keys{k.dimensions(), lead};
  const Led values{v.dimensions(), lead}, seen{mask.dimensions(), lead};
  const Led begin{first.dimensions(), lead}, end{last.dimensions(), lead};
  const bool ranks = keys.dims.size() == lead + 4 && values.dims.size() == lead + 4 &&
                     seen.dims.size() == lead + 3 && begin.dims.size() == lead &&
                     end.dims.size() == lead && out->dimensions().size() == lead + 3;
  if (!ranks) return wrong("arrays of the attention differ in rank");
  const auto kind = k.element_type();
  const bool types = q.element_type() == ffi::F32 && v.element_type() == kind &&
                     (kind == ffi::F32 || kind == ffi::BF16) &&
                     mask.element_type() == ffi::PRED &&
                     first.element_type() == ffi::S32 && last.element_type() == ffi::S32 &&
                     out->element_type() == ffi::F32;
  if (!types) return wrong("arrays of the attention have other types");
  const int64_t batch = queries.own(0), all = queries.own(2);
  Sizes sizes{queries.own(1), keys.own(1), 0, keys.own(2), queries.own(3), cap};
  bool fits = sizes.heads > 0 && all % sizes.heads == 0 && sizes.size <= LARGEST &&
              keys.own(0) == batch && keys.own(3) == sizes.size && seen.own(0) == batch &&
              seen.own(1) == sizes.tokens && seen.own(2) == sizes.slots;
  for (size_t axis = 0; axis < 4; ++axis) fits &= keys.own(axis) == values.own(axis);
  if (!fits) return wrong("arrays of the attention do not fit each other");
  sizes.group = all / sizes.heads;

  const Type type = kind == ffi::F32 ? Type::float32 : Type::bfloat16;
  const int64_t bytes = sizes.heads * sizes.slots * sizes.size * bytes_of(type);
  const int64_t each = sizes.tokens * all * sizes.size;
  const Dimensions every = out->dimensions();
  int64_t members = 1;
  for (size_t axis = 0; axis < lead; ++axis) members *= every[axis];
  std::vector<Reading> rows;
  for (int64_t member = 0; member < members; ++member) {
    const int64_t from = first.typed_data<int32_t>()[begin.offset(member, every)];
    const int64_t to = last.typed_data<int32_t>()[end.offset(member, every)];
    for (int64_t row = 0; row < batch; ++row)
      rows.push_back(
          {q.typed_data<float>() + queries.offset(member, every) + row * each,
           static_cast<const char*>(k.untyped_data()) +
               keys.offset(member, every) * bytes_of(type) + row * bytes,
           static_cast<const char*>(v.untyped_data()) +
               values.offset(member, every) * bytes_of(type) + row * bytes,
           mask.typed_data<bool>() + seen.offset(member, every) +
               row * sizes.tokens * sizes.slots,
           std::max<int64_t>(from, 0), std::min(to, sizes.slots),
           out->typed_data<float>() + (member * batch + row) * each});
  }
  return run(pool, std::make_shared<Readings>(Set(set), type, sizes, std::move(rows)));
}

}  // namespace
}  // namespace collab_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(collab_jax_attend, collab_jax::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int32_t>("set")
                                  .Attr<float>("cap")
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
