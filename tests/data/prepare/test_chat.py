"""Conversations: the text that transformers renders, and a loss on what the assistant says."""

import json
from pathlib import Path
from typing import Any

import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.prepare import prepare
from nar_kernels.data.prepare.chat import Chat
from nar_kernels.data.tokenizer import open_tokenizer
from tests.helpers.prepared import documents, masks
from tests.helpers.texts import CHAT_ML, bpe_json, write_chat_tokenizer, write_lines

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

Messages = list[dict[str, Any]]

MARKED = """\
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# As Zephyr's and Llama 2's: with the end of text, and refusing some roles.
TURNS = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{% else %}{{ raise_exception('no such role: ' + message['role']) }}
{% endif %}
{% endfor %}"""

CONVERSATIONS: list[Messages] = [
    [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A <tag> & é."}],
    [
        {"role": "user", "content": "  one "},
        {"role": "assistant", "content": "two", "name": None},
        {"role": "user", "content": "three\n"},
        {"role": "assistant", "content": "\n\nfour 😀 "},
    ],
    [{"role": "user", "content": "only a question"}],
]


def said(chat: Chat, messages: Messages) -> list[str]:
    text, spans = chat.render(messages)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("template", [CHAT_ML, MARKED, TURNS], ids=["ml", "marked", "turns"])
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_text_is_that_of_transformers(tmp_path: Path, template: str, number: int) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_chat_tokenizer(tmp_path / "chat", template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = open_tokenizer(folder)
    assert tokenizer.chat_template is not None
    chat = Chat(tokenizer.chat_template, tokenizer.special_tokens)
    text, _ = chat.render(CONVERSATIONS[number])
    assert text == theirs.apply_chat_template(CONVERSATIONS[number], tokenize=False)
    tools = [{"type": "function", "function": {"name": "f<>", "description": "é"}}]
    text, _ = chat.render(CONVERSATIONS[number], tools=tools)
    assert text == theirs.apply_chat_template(CONVERSATIONS[number], tools=tools, tokenize=False)


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_marks_are_those_of_transformers(tmp_path: Path, number: int) -> None:
    """Token by token."""
    transformers = pytest.importorskip("transformers")
    folder = write_chat_tokenizer(tmp_path / "chat", MARKED)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = theirs.apply_chat_template(
        CONVERSATIONS[number], return_dict=True, return_assistant_tokens_mask=True
    )
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS[number]}])
    prepare(path, tmp_path / "out", tokenizer=folder, quiet=True)
    assert documents(tmp_path / "out") == [expected["input_ids"]]
    assert masks(tmp_path / "out") == [expected["assistant_masks"]]


def test_blanks_count_with_a_tokenizer_that_trims_offsets(tmp_path: Path) -> None:
    """As that of GPT-2 does."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = write_chat_tokenizer(tmp_path / "chat", MARKED)
    trims = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    trims.post_processor = tokenizers.processors.ByteLevel()
    trims.save(str(folder / "tokenizer.json"))
    messages = [
        {"role": "user", "content": "a function"},
        {"role": "assistant", "content": "def f():\n    if x:\n        y"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    prepare(path, tmp_path / "out", tokenizer=folder, quiet=True)
    assert documents(tmp_path / "out") == [expected["input_ids"]]
    assert masks(tmp_path / "out") == [expected["assistant_masks"]]
    assert counted(tmp_path / "out") == [messages[1]["content"] + "<|im_end|>"]


def test_a_template_of_ones_own_in_place_of_several(tmp_path: Path) -> None:
    """Of which none is the default: that does not matter to text either."""
    folder = write_chat_tokenizer(tmp_path / "chat")
    (folder / "chat_template.jinja").rename(tmp_path / "own.jinja")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    prepare(path, tmp_path / "text", tokenizer=folder, quiet=True)
    write_lines(path, [{"messages": CONVERSATIONS[0]}])
    with pytest.raises(ValueError, match="line 1: .*or several and none by the name of default"):
        prepare(path, tmp_path / "no", tokenizer=folder, quiet=True)
    own = tmp_path / "own.jinja"
    prepare(path, tmp_path / "out", tokenizer=folder, chat_template=own, quiet=True)
    assert counted(tmp_path / "out") == ["A <tag> & é.<|im_end|>\n"]


def test_what_the_assistant_says() -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert said(Chat(CHAT_ML, {}), CONVERSATIONS[1]) == [
        "two<|im_end|>\n",
        "\n\nfour 😀 <|im_end|>\n",
    ]
    assert said(Chat(MARKED, {}), CONVERSATIONS[1]) == [
        "two<|im_end|>",
        "\n\nfour 😀 <|im_end|>",
    ]
    assert said(Chat(TURNS, special), CONVERSATIONS[0]) == [" A <tag> & é.</s>\n"]
    assert said(Chat(TURNS, special), CONVERSATIONS[2]) == []


def test_an_assistant_that_begins() -> None:
    messages = [{"role": "assistant", "content": "hello"}, *CONVERSATIONS[0]]
    assert said(Chat(CHAT_ML, {}), messages)[0] == "hello<|im_end|>\n"
    # As Qwen's, which looks whether there is a system prompt.
    looks = "{% if messages[0].role == 'system' %}{{ 'system' }}{% endif %}"
    assert said(Chat(looks + MARKED, {}), messages)[0] == "hello<|im_end|>"
    with pytest.raises(ValueError, match="the assistant begins the conversation, .*generation %}"):
        Chat(looks + CHAT_ML, {}).render(messages)


def test_a_template_that_rewrites_what_came_before() -> None:
    """As those that drop the thoughts of earlier answers."""
    template = (
        "{% for message in messages %}{{ message.role }}: "
        "{{ message.content if loop.last else message.content.split('</think>')[-1] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    thought = {"role": "assistant", "content": "hm</think>yes"}
    messages = [{"role": "user", "content": "a"}, thought]
    assert said(Chat(template, {}), messages) == ["hm</think>yes\n"]
    with pytest.raises(ValueError, match="writes the first 2 messages otherwise .*generation %}"):
        Chat(template, {}).render([*messages, {"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{% for %}", CONVERSATIONS[0], "the chat template is malformed, in line 1"),
        ("{{ raise_exception('no') }}", CONVERSATIONS[0], "the chat template fails: no$"),
        ("{{ messages[0].a.b }}", CONVERSATIONS[0], "the chat template fails: .*no attribute 'a'"),
        ("{{ strftime_now('%Y') }}", CONVERSATIONS[0], "must not depend on today's date"),
        ("{{ messages.append(1) }}", CONVERSATIONS[0], "the chat template fails: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", CONVERSATIONS[0], "the chat template fails: .*unsafe"),
        ("{{ 1 / 0 }}", CONVERSATIONS[0], "the chat template fails: division by zero"),
        ("{{ 2.0 ** 9999 }}", CONVERSATIONS[0], "the chat template fails: .*out of range"),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            CONVERSATIONS[0],
            "the chat template fails: maximum recursion",
        ),
        (CHAT_ML, [], "its messages are no list like"),
        (CHAT_ML, "hello", "its messages are no list like"),
        (CHAT_ML, ["hello"], "message 0 is not like"),
        (CHAT_ML, [{"role": 1, "content": "a"}], "message 0 is not like"),
        (
            CHAT_ML,
            [*CONVERSATIONS[0], {"role": "user"}],
            "message 2, of the user, has no 'content'",
        ),
        (MARKED, [{"role": "user", "content": "\ufdd0"}], "message 0 has U.FDD0 or U.FDD1"),
        (
            MARKED,
            [{"role": "user", "content": [{"type": "text", "text": "\ufdd1"}]}],
            "message 0 has U.FDD0 or U.FDD1",
        ),
        (TURNS, [{"role": "tool", "content": "x"}], "the chat template fails: no such role: tool"),
    ],
)
def test_mistakes(template: str, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chat(template, {}).render(messages)


def test_marks_in_tools() -> None:
    with pytest.raises(ValueError, match="the list of tools has U.FDD0"):
        Chat(MARKED, {}).render(CONVERSATIONS[0], tools=[{"name": "\ufdd0"}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_chat_tokenizer(tmp_path / "chat")


def counted(out: Path) -> list[str]:
    """The text of each document that counts in a loss."""
    manifest = Corpus(out).manifests[0]
    assert manifest.tokenizer is not None
    tokenizer = open_tokenizer(out / manifest.tokenizer.file)
    pairs = zip(documents(out), masks(out), strict=True)
    return [
        tokenizer.decode([i for i, counts in zip(ids, mask, strict=True) if counts])
        for ids, mask in pairs
    ]


def test_records_of_every_kind_in_one_corpus(tmp_path: Path, folder: Path) -> None:
    records = [
        {"text": "plain text"},
        {"messages": CONVERSATIONS[1]},
        {"prompt": "Q: 1 + 1\nA:", "completion": " 2."},
        {"prompt": CONVERSATIONS[2], "completion": [{"role": "assistant", "content": "fine"}]},
        {"text": CONVERSATIONS[0]},
        {"messages": CONVERSATIONS[2]},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    out = tmp_path / "out"
    prepare(path, out, tokenizer=folder, quiet=True)
    assert counted(out) == [
        "plain text<|im_end|>",
        "two<|im_end|>\n\n\nfour 😀 <|im_end|>\n",
        " 2.<|im_end|>",
        "fine<|im_end|>\n",
        "A <tag> & é.<|im_end|>\n",
        "",
    ]
    tokenizer = open_tokenizer(folder)
    texts = [tokenizer.decode(ids) for ids in documents(out)]
    assert texts[2] == "Q: 1 + 1\nA: 2.<|im_end|>"
    assert texts[4] == Chat(CHAT_ML, {}).render(CONVERSATIONS[0])[0]
    # The template says where a conversation ends, unless told otherwise.
    prepare(path, tmp_path / "eos", tokenizer=folder, quiet=True, append_eos=True)
    assert counted(tmp_path / "eos")[1].endswith("<|im_end|>\n<|im_end|>")
    assert counted(tmp_path / "eos")[5] == ""
    assert documents(tmp_path / "eos")[5][-1] == tokenizer.eos_id


def test_shards_without_conversations_have_a_mask_of_ones(tmp_path: Path, folder: Path) -> None:
    records: list[Any] = [{"text": "some text " * 9}] * 6
    records[3] = {"messages": CONVERSATIONS[0]}
    path = write_lines(tmp_path / "a.jsonl", records)
    prepare(path, tmp_path / "out", tokenizer=folder, quiet=True, shard_tokens=1, batch_bytes=50)
    manifest = Corpus(tmp_path / "out").manifests[0]
    assert all(shard.loss_mask for shard in manifest.shards) and len(manifest.shards) == 6
    for i, mask in enumerate(masks(tmp_path / "out")):
        assert set(mask) == ({0, 1} if i == 3 else {1})


def test_a_token_that_straddles_counts(tmp_path: Path) -> None:
    """The model must produce it, as in transformers' masks."""
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(bpe_json())
    (tmp_path / "bpe.json").write_text(bpe_json())
    token = next(t for t in (" the", " of", " is") if len(theirs.encode(t).ids) == 1)
    record = {"prompt": "b" + token[:2], "completion": token[2:]}
    path = write_lines(tmp_path / "a.jsonl", [record])
    prepare(path, tmp_path / "out", tokenizer=tmp_path / "bpe.json", quiet=True)
    ids = theirs.encode("b" + token).ids
    assert documents(tmp_path / "out") == [[*ids, 0]]
    assert masks(tmp_path / "out") == [[0] * (len(ids) - 1) + [1, 1]]


def test_tokenizers_of_other_kinds(tmp_path: Path) -> None:
    """With a template of one's own; bytes have no special tokens."""
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}|"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS[1]}])
    options = {"chat_template": tmp_path / "template.jinja", "quiet": True}
    prepare(path, tmp_path / "out", tokenizer="bytes", **options)
    assert counted(tmp_path / "out") == ["two|\n\nfour 😀 |"]
    tokenizer = open_tokenizer(tmp_path / "out/tokenizer.json")
    assert tokenizer.name == "bytes" and tokenizer.chat_template is not None
    prepare(path, tmp_path / "trained", train_bpe=300, **options)
    assert counted(tmp_path / "trained") == [" two|\n\nfour 😀 |"]  # the blank is of its token
    assert open_tokenizer(tmp_path / "trained/tokenizer.json").chat_template is not None


def test_the_mask_token_in_a_conversation(tmp_path: Path, folder: Path) -> None:
    bad = [{"role": "user", "content": "<|mdm_mask|>"}, *CONVERSATIONS[0][1:]]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS[0]}, {"messages": bad}])
    with pytest.raises(ValueError, match="line 2: it has the text of the mask .*'<|mdm_mask|>'"):
        prepare(path, tmp_path / "out", tokenizer=folder, quiet=True)


def test_special_tokens_in_a_completion(tmp_path: Path, folder: Path) -> None:
    """As in other text: the mask token is text, and with an option so are all."""
    records = [
        {"prompt": "a", "completion": "<|im_start|>b"},
        {"prompt": "a<|mdm_mask|>", "completion": "b"},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    start = 600
    for name, parse in (("1", True), ("2", False)):
        out = tmp_path / name
        prepare(path, out, tokenizer=folder, quiet=True, parse_special_tokens=parse)
        assert counted(out) == ["<|im_start|>b<|im_end|>", "b<|im_end|>"]
        assert (start in documents(out)[0]) == parse
        assert 602 not in documents(out)[1]


def test_a_broken_template_does_not_matter_to_text(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "chat", "{% for %}")
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    prepare(path, tmp_path / "out", tokenizer=folder, quiet=True)
    write_lines(path, [{"messages": CONVERSATIONS[0]}])
    with pytest.raises(ValueError, match="line 1: the chat template is malformed, in line 1"):
        prepare(path, tmp_path / "chat out", tokenizer=folder, quiet=True)


def test_mistakes_name_the_record(tmp_path: Path, folder: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"messages": [{"role": "user"}]}])
    with pytest.raises(ValueError, match="a.jsonl, line 2: message 0, of the user, has no"):
        prepare(path, tmp_path / "out", tokenizer=folder, quiet=True)


def test_conversations_in_parquet(tmp_path: Path, folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"messages": messages} for messages in CONVERSATIONS]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", records)
    for name in ("a.parquet", "a.jsonl"):
        prepare(tmp_path / name, tmp_path / f"{name}.out", tokenizer=folder, quiet=True)
    assert documents(tmp_path / "a.parquet.out") == documents(tmp_path / "a.jsonl.out")
    assert masks(tmp_path / "a.parquet.out") == masks(tmp_path / "a.jsonl.out")


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% for t in tools %}<{{ t.name }}>{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def call(**arguments: int) -> Messages:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]


def test_tables_have_the_text_of_lines(tmp_path: Path) -> None:
    """Although each object in a column has the keys of all others."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        {"messages": call(a=1), "tools": [{"name": "f", "a": "x"}]},
        {"messages": call(b=1), "tools": [{"name": "f", "b": {"c": 1}}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", records)
    (tmp_path / "calls.jinja").write_text(CALLS)
    for name in ("a.parquet", "a.jsonl"):
        options = {"chat_template": tmp_path / "calls.jinja", "quiet": True}
        prepare(tmp_path / name, tmp_path / f"{name}.out", tokenizer="bytes", **options)
    found = documents(tmp_path / "a.parquet.out")
    assert found == documents(tmp_path / "a.jsonl.out")
    assert b'"arguments": {"a": 1}' in bytes(found[0]) and b"null" not in bytes(found[0])


def test_tools_as_json(tmp_path: Path) -> None:
    tools = [{"name": "f"}, {"name": "g"}]
    (tmp_path / "calls.jinja").write_text(CALLS)
    options: dict[str, Any] = {"chat_template": tmp_path / "calls.jinja", "quiet": True}
    found = []
    for i, given in enumerate((tools, json.dumps(tools))):
        path = write_lines(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS[0], "tools": given}])
        prepare(path, tmp_path / f"{i}", tokenizer="bytes", **options)
        found.append(documents(tmp_path / f"{i}"))
    assert found[0] == found[1] and b"<f><g>" in bytes(found[0][0])
    for bad in ("search", '{"name": "f"}', {"name": "f"}, 7):
        write_lines(path, [{"messages": CONVERSATIONS[0], "tools": bad}])
        with pytest.raises(ValueError, match="line 1: 'tools' is .*must be a list of objects"):
            prepare(path, tmp_path / "bad", tokenizer="bytes", **options)


@pytest.mark.seconds
def test_workers_render_the_same(tmp_path: Path, folder: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": c} for c in CONVERSATIONS * 20])
    for workers in (1, 2):
        options = {"tokenizer": folder, "quiet": True, "batch_bytes": 500}
        prepare(path, tmp_path / f"{workers}", workers=workers, **options)
    assert json.loads((tmp_path / "1/manifest.json").read_text()) == json.loads(
        (tmp_path / "2/manifest.json").read_text()
    )
    assert masks(tmp_path / "1") == masks(tmp_path / "2")
