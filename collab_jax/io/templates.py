"""Chat templates: the well-known ones by name, and the one that most models have."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from collab_jax.io.json_file import read_json

# Written from the formats that the models' makers describe. Those that mergekit 0.1.5
# writes for alpaca, exaone and llama3 have further spaces and line ends, which the
# models have not seen in training.
TEMPLATES = {
    # Stanford Alpaca's prompt, https://github.com/tatsu-lab/stanford_alpaca
    "alpaca": (
        "{%- for message in messages %}"
        "{%- if message['role'] == 'system' %}"
        "{{- message['content'] | trim + '\\n\\n' }}"
        "{%- elif message['role'] == 'user' %}"
        "{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}"
        "{%- elif message['role'] == 'user_context' %}"
        "{{- '### Input:\\n' + message['content'] | trim + '\\n\\n' }}"
        "{%- else %}"
        "{{- '### Response:\\n' + message['content'] | trim + '\\n\\n' }}"
        "{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
    ),
    # OpenAI's Chat Markup Language
    "chatml": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] + '\\n' }}"
        "{{- message['content'] + '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    # EXAONE 3.5, https://huggingface.co/LGAI-EXAONE
    "exaone": (
        "{%- if not messages or messages[0]['role'] != 'system' %}"
        "{{- '[|system|][|endofturn|]\\n' }}"
        "{%- endif %}"
        "{%- for message in messages %}"
        "{{- '[|' + message['role'] + '|]' + message['content'] }}"
        "{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}"
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
    "llama3": (
        "{{- bos_token }}"
        "{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{- message['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{%- endif %}"
    ),
    # https://docs.mistral.ai, the text form of the instruct models
    "mistral": (
        "{%- set first = messages[0]['role'] == 'system' %}"
        "{%- set turns = messages[1:] if first else messages %}"
        "{{- bos_token }}"
        "{%- for message in turns %}"
        "{%- set due = 'assistant' if loop.index0 % 2 else 'user' %}"
        "{%- if message['role'] != due %}"
        "{{- raise_exception('user and assistant must alternate after the system "
        "message, beginning with user') }}"
        "{%- elif due == 'user' %}"
        "{%- set above = messages[0]['content'] + '\\n\\n' if first and loop.first "
        "else '' %}"
        "{{- ' [INST] ' + above + message['content'] + ' [/INST]' }}"
        "{%- else %}"
        "{{- ' ' + message['content'] + eos_token }}"
        "{%- endif %}"
        "{%- endfor %}"
    ),
}


def read_template(folder: str | Path) -> str | None:
    """The chat template of a model's folder, None where it has none.

    Args:
      folder: in the Hugging Face layout. Of several named templates it is the default.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> read_template(folder) is None
    True
    >>> size = (folder / "chat_template.jinja").write_text("{{ messages }}")
    >>> read_template(folder)
    '{{ messages }}'
    """
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # of {"name": ..., "template": ...}
            named = {entry["name"]: entry["template"] for entry in found}
            found = named.get("default")
        if found:
            return found
    return None


def choose_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The chat template that a config asks for.

    Args:
      wanted: "auto", a name of `TEMPLATES`, or a template in Jinja.
      folders: of the models, in the order of the config. With "auto" it is the template
        that most of them have but for spaces around it, the first of these where
        several are as frequent.

    Returns:
      The template; None for "auto" where no model has one.

    Raises:
      ValueError: for an unknown name, or a template that Jinja cannot read.

    >>> choose_template("auto", []) is None
    True
    >>> choose_template("chatlm", [])
    Traceback (most recent call last):
    ValueError: chat_template 'chatlm' is neither auto, alpaca, chatml, exaone, llama3,
    mistral nor a template in Jinja
    """
    if wanted == "auto":
        found = [t.strip() for t in map(read_template, folders) if t is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{{" not in wanted and "{%" not in wanted:
        raise ValueError(
            f"chat_template {wanted!r} is neither auto, {', '.join(TEMPLATES)} nor a "
            "template in Jinja"
        )
    from jinja2 import TemplateSyntaxError  # slow to import, seldom needed
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        extensions = ["jinja2.ext.loopcontrols"]  # as transformers renders it
        ImmutableSandboxedEnvironment(extensions=extensions).parse(
            # its own block, which Jinja does not know
            wanted.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat_template: line {error.lineno} is no Jinja: {error.message}"
        ) from None
    return wanted
