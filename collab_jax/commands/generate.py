"""`collab-jax generate`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from collab_jax.commands import drafting, joining, options

if TYPE_CHECKING:
    from collab_jax.decoder import Decoder
    from collab_jax.respond import Codec, Own


@click.command(cls=joining.ListsCommand)
@click.argument("source", required=False)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated."
)
@click.option(
    "--input",
    "input_file",
    type=click.Path(),
    metavar="FILE",
    help='JSONL, each line an object with a "prompt".',
)
@click.option(
    "--output",
    type=click.Path(),
    metavar="FILE",
    help="JSONL of the results; a run that was cut short goes on from there.",
)
@options.text
@options.sampling
@click.option(
    "--beams",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Beam search with N beams.",
)
@click.option(
    "--length-penalty",
    type=float,
    default=1.0,
    show_default=True,
    metavar="X",
    help="Beams are ranked by log-prob / length ** X.",
)
@joining.ensemble
@joining.weights
@joining.bridge
@joining.contrast
@joining.proxy
@joining.context
@joining.strength
@drafting.draft
@drafting.draft_length
@drafting.verify
@options.dtype
@options.matrices
@options.batch_size
@click.option("--stream", is_flag=True, help="Print each token as it comes.")
@options.as_json
def generate(
    source: str | None,
    prompts: tuple[str, ...],
    input_file: str | None,
    output: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    stops: tuple[str, ...],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    beams: int,
    length_penalty: float,
    ensemble: tuple[str, ...],
    weights: tuple[float, ...],
    bridge: str | None,
    contrast: str | None,
    proxy: tuple[str, str] | None,
    context: str | None,
    strength: float | None,
    draft: str | None,
    draft_length: int | None,
    verify: str | None,
    dtype: str,
    matrices: str,
    batch_size: int,
    stream: bool,
    as_json: bool,
) -> None:
    """Continue prompts, or answer them with --chat. Greedy, unless told to sample.

    \b
    collab-jax generate gemma-3-270m --prompt "Once upon a time"
    collab-jax generate smollm2-135m-instruct --chat --prompt "Name three rivers."
    collab-jax generate gemma-3-270m --prompt Once --temperature 0.8 --top-p 0.95
    collab-jax generate gemma-3-270m --input prompts.jsonl --output out.jsonl
    collab-jax generate gemma-3-270m --prompt "1 2 3 1 2 3" --draft ngram
    collab-jax generate gemma-3-270m --prompt Once --matrices int8
    collab-jax generate --ensemble gemma-3-270m smollm2-135m-instruct --prompt Once
    collab-jax generate smollm2-135m-instruct --context "Cats bark." --prompt "Cats"

    Members of an ensemble may have different tokenizers; each reads prompts in its own
    tokens, and with --chat in its own template. What --ensemble, --contrast, --proxy
    and --context make is one model for all other options, --draft and --beams too.

    With --json, stdout is a list of objects with "prompt", "prompt_tokens", "tokens"
    and "text"; with --draft also "calls" of the model, "drafted" and "accepted" tokens.
    """
    sampling = options.Sampling(temperature, top_k, top_p, min_p)
    _agree(prompts, input_file, output, stream, as_json, beams, sampling, stops)
    greedy = sampling.warps() is None
    drafting.check_flags(draft, draft_length, verify, beams, greedy)
    kind = joining.check_flags(
        source, ensemble, weights, bridge, contrast, proxy, context, strength
    )
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    from collab_jax import records

    if input_file is None:
        texts = list(prompts)
        lines: list[dict[str, Any]] = [{} for _ in texts]
    else:
        lines = records.read(input_file, ["prompt"], _with_text)
        texts = [line["prompt"] for line in lines]

    from collab_jax.commands import members
    from collab_jax.commands.opening import open_source

    names = [*([source] if source else []), *ensemble, *(proxy or ())]
    names += [contrast] if contrast else []
    reading: dict[str, Any] = {"chat": chat, "system": system}
    reading["matrices"] = matrices
    sources = [open_source(name, dtype, **reading) for name in names]
    join = None
    if kind is not None:
        join = members.open_join(
            kind, names, sources, texts,
            weights=weights, bridge=bridge, strength=strength, context=context,
        )  # fmt: skip
    drafter = None
    if draft is not None:
        drafter = drafting.open_drafter(
            draft, draft_length, verify, sources[0], dtype, **reading
        )
        if join is not None:
            members.check_drafter(join, drafter)
    settings = {
        "source": source,
        "model": sources[0].fingerprint(),
        **({} if join is None else join.told()),
        **({} if strength is None else {"strength": strength}),
        "dtype": dtype,
        **({} if matrices == "plain" else {"matrices": matrices}),
        "chat": chat,
        "system": system,
        "max_new_tokens": max_new_tokens,
        "stop": stops,
        **sampling._asdict(),
        "seed": seed,
        "beams": beams,
        "length_penalty": length_penalty,
        **({} if drafter is None else _told(drafter)),
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    journal = None
    if output is not None:
        journal = records.journal(output, settings, identity="prompts")
    todo = [i for i in range(len(texts)) if journal is None or i not in journal.done]
    if len(todo) < len(texts):
        click.echo(f"{len(texts) - len(todo)} of {len(texts)} are done", err=True)

    results: dict[int, dict[str, Any]] = {}
    if todo:
        from collab_jax.combine import prefixed
        from collab_jax.commands.strategy import Strategy, check_run, row_keys

        chosen = [texts[i] for i in todo]
        each = sources if join is None else join.members()
        rooms = None if join is None else join.rooms()
        check_run(each, chosen, max_new_tokens, batch_size, beams, drafter, rooms)
        strategy = Strategy(
            sampling, max_new_tokens, stops, beams, length_penalty, drafter
        )
        models = [opened.load() for opened in sources]
        own: Own | None = None
        codec, params, lm = sources[0].codec, models[0].params, models[0].lm
        if join is not None:
            codec, params, lm = join.codec(), join.params(models), join.lm(models)
            own = members.own(join, drafter) if join.own else None
        small, drafts = None, None
        if drafter is not None:
            small = drafter.opened.load() if drafter.opened else None
            params = params, () if small is None else small.params
        if small is not None:
            drafts = small.lm if own is None else prefixed(small.lm)
        decoder = strategy.decoder(lm, codec, drafts)
        keys = row_keys(seed, todo)
        if stream:
            from collab_jax.commands.stream import print_streams

            print_streams(codec, params, decoder, chosen, stops, keys, own)
            return

        def keep(number: int, record: dict[str, Any]) -> None:
            index = todo[number]
            results[index] = {**lines[index], **record}
            if journal is not None:
                journal.append([{"index": index, **results[index]}])

        _answer(codec, params, decoder, chosen, stops, keys, batch_size, keep, own)
        if drafter is not None:
            click.echo(drafting.told(list(results.values())), err=True)
    if journal is not None:
        found = journal.finish()
        click.echo(f"{len(found)} results in {output}", err=True)
    else:
        found = [results[i] for i in range(len(texts))]
    if as_json:
        rows = [json.dumps(record, ensure_ascii=False) for record in found]
        click.echo("[" + ",\n ".join(rows) + "]")
    elif journal is None:
        _show(found)


def _agree(
    prompts: Sequence[str],
    input_file: str | None,
    output: str | None,
    stream: bool,
    as_json: bool,
    beams: int,
    sampling: options.Sampling,
    stops: Sequence[str],
) -> None:
    """Refuses flags that contradict each other."""
    if bool(prompts) == (input_file is not None):
        raise click.UsageError("give --prompt TEXT or --input FILE, one of them")
    if (input_file is None) != (output is None):
        raise click.UsageError("--input FILE and --output FILE go together")
    if stream and (as_json or output is not None or beams > 1):
        raise click.UsageError("--stream goes without --json, --output and --beams")
    if beams > 1 and sampling.given:
        raise click.UsageError(f"--beams goes without {', '.join(sampling.given)}")
    if not all(stops):
        raise click.UsageError("--stop wants a text that is not empty")


def _told(drafter: drafting.Drafter) -> dict[str, Any]:
    """What of a draft decides the text."""
    model = None if drafter.opened is None else drafter.opened.fingerprint()
    return {
        "draft": [drafter.name, model],
        "draft_length": drafter.length,
        "verify": drafter.verify,
    }


def _with_text(record: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(record["prompt"], str):
        raise ValueError(f'"prompt" must be a text, found {record["prompt"]!r}')
    return record


def _answer(
    codec: "Codec",
    params: Any,
    decoder: "Decoder",
    texts: Sequence[str],
    stops: Sequence[str],
    keys: Any,
    batch_size: int,
    keep: Callable[[int, dict[str, Any]], None],
    own: "Own | None",
) -> None:
    """Decodes all texts in batches, and says how fast."""
    from collab_jax.commands.progress import progress
    from collab_jax.respond import Cost, from_decoder

    with progress("prompts", len(texts)) as advance:

        def report(number, reply):
            counts = {
                name: int(getattr(reply.info.info, name))
                for name in ("calls", "drafted", "accepted")
                if hasattr(reply.info.info, name)
            }
            keep(
                number,
                {
                    "prompt": texts[number],
                    "prompt_tokens": reply.info.prompt_tokens,
                    "tokens": reply.info.tokens,
                    "text": reply.text,
                    "logprob": reply.score,
                    "finish": reply.info.finish,
                    **counts,
                },
            )
            advance()

        ask = from_decoder(
            decoder, params, codec, stops=stops, batch_size=batch_size, report=report,
            own=own,
        )  # fmt: skip
        cost = sum((reply.cost for reply in ask(texts, keys)), Cost())
    speed = cost.generated_tokens / cost.seconds
    click.echo(
        f"{cost.generated_tokens} tokens in {cost.seconds:.1f} s with compiling, "
        f"{speed:.1f} a second",
        err=True,
    )


def _show(found: Sequence[dict[str, Any]]) -> None:
    from collab_jax.commands.stream import heading

    for number, record in enumerate(found):
        if len(found) > 1:
            click.echo(heading(number, len(found), record["prompt"]))
        click.echo(record["text"])
