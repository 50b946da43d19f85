// The products of product.h as a handler of XLA's foreign function interface.

#include "arrays.h"
#include "product.h"

namespace collab_jax {
namespace {

// Operands: x [*lead, R, K] float32, or bfloat16 where the set takes such; n matrices of
// panels [*lead, P, K, 32]; for int8 their n scales [*lead, N]. Results: n times
// [*lead, R, N].
ffi::Error products(ffi::ThreadPool pool, int32_t set, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  if (!supports(Set(set))) return wrong("this processor lacks the instruction set");
  const size_t count = results.size();
  if (count == 0 || operands.size() < 1 + count) return wrong("operands are missing");
  const auto x = operands.get<ffi::AnyBuffer>(0);
  const Type own = !x.has_error() && x->element_type() == ffi::BF16 ? Type::bfloat16
                                                                    : Type::float32;
  if (x.has_error() || (x->element_type() != ffi::F32 && own == Type::float32) ||
      x->dimensions().size() < 2)
    return wrong("x is neither float32 nor bfloat16 [rows, K]");
  const size_t lead = x->dimensions().size() - 2;
  const Led left{x->dimensions(), lead};
  const int64_t rows = left.own(0), depth = left.own(1);
  const auto kind = operands.get<ffi::AnyBuffer>(1)->element_type();
  if (kind != ffi::F32 && kind != ffi::U16 && kind != ffi::U8)
    return wrong("panels are neither float32, uint16 nor uint8");
  const Type type = kind == ffi::F32   ? Type::float32
                    : kind == ffi::U16 ? Type::bfloat16
                                       : Type::int8;
  if (!takes(Set(set), type, own))
    return wrong("x is bfloat16, which the instruction set does not multiply by such panels");
  const bool scaled = type == Type::int8;
  if (operands.size() != 1 + count * (scaled ? 2 : 1))
    return wrong("the number of operands does not fit the number of results");

  std::vector<Product> found;
  for (size_t n = 0; n < count; ++n) {
    const auto w = operands.get<ffi::AnyBuffer>(1 + n);
    const auto s = operands.get<ffi::AnyBuffer>(scaled ? 1 + count + n : 1 + n);
    auto y = results.get<ffi::AnyBuffer>(n);
    const Dimensions all = (*y)->dimensions();
    if (w->element_type() != kind || w->dimensions().size() != lead + 3 ||
        all.size() != lead + 2)
      return wrong("panels or results differ in type or rank");
    const Led right{w->dimensions(), lead};
    const Led scale{s->dimensions(), lead};
    const int64_t width = all[lead + 1];
    const bool fits = right.own(0) == (width + PANEL - 1) / PANEL &&
                      right.own(1) == depth && right.own(2) == PANEL &&
                      all[lead] == rows && (*y)->element_type() == ffi::F32;
    if (!fits) return wrong("panels do not fit x and the result");
    if (scaled && (s->element_type() != ffi::F32 || s->dimensions().size() != lead + 1 ||
                   scale.own(0) != width))
      return wrong("scales are not float32 [N]");
    int64_t members = 1;
    for (size_t axis = 0; axis < lead; ++axis) members *= all[axis];
    // members that share a matrix are so many more rows of one product
    const bool folded = right.shared() && (!scaled || scale.shared()) && !left.shared() &&
                        left.offset(members - 1, all) == (members - 1) * rows * depth;
    const int64_t each = folded ? members : 1;
    // rows that stay in the near cache while all panels meet them
    const int64_t blocks = std::max<int64_t>(1, (rows * each + ROWS - 1) / ROWS);
    for (int64_t member = 0; member < members; member += each)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = rows * each * block / blocks;
        const int64_t end = rows * each * (block + 1) / blocks;
        found.push_back(
            {{static_cast<const char*>(x->untyped_data()) +
                  (left.offset(member, all) + begin * depth) * bytes_of(own),
              nullptr, end - begin},
             static_cast<const char*>(w->untyped_data()) +
                 right.offset(member, all) * bytes_of(type),
             scaled ? s->typed_data<float>() + scale.offset(member, all) : nullptr,
             (*y)->typed_data<float>() + (member * rows + begin) * width, width});
      }
  }
  return run(pool, std::make_shared<Job>(Set(set), type, own, depth, std::move(found)));
}

}  // namespace
}  // namespace collab_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(collab_jax_products, collab_jax::products,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int32_t>("set")
                                  .RemainingArgs()
                                  .RemainingRets());

// For Python: whether this processor has an instruction set.
extern "C" int collab_jax_supports(int set) {
  return collab_jax::supports(collab_jax::Set(set));
}

// For Python: whether rows of a type meet weights of a type.
extern "C" int collab_jax_takes(int set, int weights, int rows) {
  using collab_jax::Type;
  return collab_jax::takes(collab_jax::Set(set), Type(weights), Type(rows));
}
