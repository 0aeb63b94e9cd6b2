"""What hides secrets, at its limits: any text around them, any nesting, addresses, keys of several lines, bytes, very long texts."""

import base64
import json
import re
import string
from typing import Any
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llmbot.monitoring.error_log import MAX_MESSAGE, redact
from llmbot.monitoring.redaction import HIDDEN, SHORTEST, Redactor, is_secret_name

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(CHARACTERS, max_size=40)
WORDS = st.text(string.ascii_lowercase + " .,", max_size=60)
SECRET = st.text(CHARACTERS, min_size=SHORTEST, max_size=40).map(str.strip).filter(
    lambda s: len(s) >= SHORTEST and not any(part in HIDDEN for part in (s, s.strip("[]"))) and HIDDEN not in s)  # fmt: skip
SECRET_NAMES = st.sampled_from(["password", "api_key", "HF_TOKEN", "db-password", "Authorization", "aws.secret", "Cookie", "PRIVATE_KEY"])
PLAIN_NAMES = st.sampled_from(["loss", "text", "eos_token", "tokens", "author", "keyword", "monkey_business"])
ALNUM = st.text(string.ascii_letters + string.digits, min_size=16, max_size=60)


def trees(leaf: st.SearchStrategy[Any], names: st.SearchStrategy[str] = TEXT) -> st.SearchStrategy[Any]:
    "Whatever is nested of lists, tuples and mappings, with such leaves."

    def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(names, inner, max_size=3)

    return st.recursive(leaf, around, max_leaves=6)


def told(value: Any) -> str:
    "Everything that a value says, in one text."
    return json.dumps(value, ensure_ascii=False)


@QUICK
@given(before=TEXT, secret=SECRET, after=TEXT)
def test_a_known_secret_is_nowhere(before: str, secret: str, after: str) -> None:
    shown = Redactor([secret], env={}).text(before + secret + after)
    assert secret not in shown
    assert HIDDEN in shown


@QUICK
@given(secret=SECRET, data=st.data())
def test_at_any_depth(secret: str, data: st.DataObject) -> None:
    "As text, as bytes, as part of either, as a key: and everything else keeps its shape."
    ways = [secret, secret.encode(), bytearray(secret.encode()), f"see {secret}!", f"see {secret}!".encode()]
    tree = data.draw(trees(st.sampled_from(ways) | st.integers() | st.none() | st.booleans(), WORDS | st.just(secret)))
    shown = Redactor([secret], env={}).value(tree)
    assert json.dumps(secret, ensure_ascii=False)[1:-1] not in told(shown)

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return [shape(inner) for inner in value.values()]
        return [shape(inner) for inner in value] if isinstance(value, list | tuple) else None

    assert shape(shown) == shape(tree)


@QUICK
@given(name=SECRET_NAMES, tree=trees(TEXT.filter(bool) | st.integers() | st.floats(allow_nan=False), WORDS))
def test_all_below_a_secret_name_is_hidden(name: str, tree: Any) -> None:
    "Numbers too; the names below it may be read."

    def leaves(value: Any) -> list[Any]:
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for one in inner for leaf in leaves(one)] if isinstance(value, dict | list) else [value]

    assert set(leaves(Redactor(env={}).value({"deep": [{name: tree}]}))) <= {HIDDEN}


@QUICK
@given(tree=trees(WORDS | st.integers() | st.booleans() | st.none(), PLAIN_NAMES))
def test_what_is_no_secret_stays(tree: Any) -> None:
    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lists(inner) for key, inner in value.items()}
        return [lists(inner) for inner in value] if isinstance(value, list | tuple) else value

    assert Redactor(env={"A_TOKEN": "never-to-be-seen"}).value(tree) == lists(tree)


@QUICK
@given(secret=SECRET, name=st.sampled_from(["api_key", "token", "access_token", "sig", "X-Amz-Signature", "client%5Fsecret"]))
def test_in_addresses(secret: str, name: str) -> None:
    "By the name of a parameter, as the login, and a known one however it is encoded."
    nothing, known = Redactor(env={}), Redactor([secret], env={})
    written = quote(secret, safe="")
    for url in (f"https://h/p?page=2&{name}={written}&x=1", f"https://h/p#{name}={written}", f"https://ann:{written}@h/p?page=2",
                f"postgresql+psycopg://ann:{written}@h/db", f"https://{written}@h/"):  # fmt: skip
        shown = nothing.text(f"see {url} now")
        assert written not in shown, url
        assert shown.startswith("see ")
        assert shown.endswith(" now")
    for text in (f"https://h/{written}/x", f"https://h/?{urlencode({'q': secret})}", quote_plus(secret), json.dumps({"a": secret})):
        shown = known.text(text)
        assert not any(way in shown for way in (secret, written, quote_plus(secret), json.dumps(secret)[1:-1]))


@QUICK
@given(first=ALNUM, second=ALNUM)
def test_a_password_with_an_at_sign(first: str, second: str) -> None:
    shown = Redactor(env={}).text(f"mongodb://ann:{first}@{second}@host:27017/db")
    assert shown == f"mongodb://{HIDDEN}@host:27017/db"


@QUICK
@given(body=st.binary(min_size=60, max_size=400), kind=st.sampled_from(["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "]),
       end=st.sampled_from(["\n", "\r\n", "\\n"]), cut=st.booleans())  # fmt: skip
def test_private_keys(body: bytes, kind: str, end: str, cut: bool) -> None:
    "Of several lines, as JSON writes them, cut off in the middle; a known one even line by line."
    lines = re.findall(".{1,64}", base64.b64encode(body).decode())
    key = end.join([f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"])
    shown = Redactor(env={}).text(f"before {key[: len(key) // 2 + 30] if cut else key}" + ("" if cut else " after"))
    assert shown == f"before {HIDDEN}" + ("" if cut else " after")
    known = Redactor([key.replace("\\n", "\n")], env={})
    assert not any(line in known.text(f"line {number}: {line}") for number, line in enumerate(lines) if len(line) >= 16)


def test_a_key_block_of_pgp() -> None:
    block = "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nabcd\n=x\n-----END PGP PRIVATE KEY BLOCK-----"
    assert Redactor(env={}).text(f"<{block}>") == f"<{HIDDEN}>"


@QUICK
@given(value=ALNUM, name=st.sampled_from(["PASSWORD", "api_key", "MY_API_KEY", "--access-token", "x-secret"]),
       quoting=st.sampled_from(["", '"', "'"]))  # fmt: skip
def test_assignments(value: str, name: str, quoting: str) -> None:
    redactor = Redactor(env={})
    assert value not in redactor.text(f"run --x 1 {name}={quoting}{value}{quoting} --y 2")
    assert redactor.text(f"eos_token={value}") == f"eos_token={value}" or value.startswith(("sk", "hf", "eyJ"))
    assert value not in redactor.text(json.dumps({"deep": {name.strip("-"): value}})) or "token" in name
    assert redactor.text(json.dumps({"eos_token": "<|im_end|>"})) == json.dumps({"eos_token": "<|im_end|>"})


@QUICK
@given(before=WORDS.map(lambda s: s + " "), value=ALNUM, after=WORDS.map(lambda s: " " + s), data=st.data(),
       name=st.sampled_from(["password", "api_key", "MY_API_KEY", "x-secret", "hf_token", "access-token", "DB_PASSWD"]))  # fmt: skip
def test_names_in_free_text(before: str, value: str, after: str, data: st.DataObject, name: str) -> None:
    "As an option, in YAML, in Python, in the repr of a dictionary, of bytes, and where an assignment is assigned."
    long = f"{value} {value[::-1]}"  # in quotes, a value has spaces
    plain = [f"--{name} {value}", f"{name}: {value}", f"{name} = {value}", f"note = {name}={value}", f"--{name}={value}"]
    quoted = [f'--{name} "{value}"', f'{name} = "{long}"', f"{name}: '{long}'", f"{name}='{long}'", repr({"a": 1, name: long, "b": "c"}),
              repr({name: f"it's {long}"}), repr({name: long.encode()})]  # fmt: skip
    text = data.draw(st.sampled_from(plain + quoted))
    shown = Redactor(env={}).text(before + text + after)
    assert value not in shown
    assert value[::-1] not in shown or value == value[::-1]
    assert shown.startswith(before)
    assert shown.endswith(after)
    told = redact(before + text + after)
    assert value not in told


def test_what_only_sounds_like_a_secret() -> None:
    "Counts and control tokens in values, in text, and in the messages of errors."
    values = {"api_key_env": "OPENAI_API_KEY", "token_usage": {"prompt": 3}, "mask_token": "<mask>", "time_to_first_token": 0.1,
              "text": "max_new_tokens: 512 and tokens = 7, tokenizer: bpe; the next token: Paris. A secret is told: nothing"}  # fmt: skip
    assert Redactor(env={}).value(values) == values
    for message in ("tokens: 512", "max_new_tokens=2048, num_key_value_heads: 8", "the row has 900 tokens: 512 fit"):
        assert redact(message) == message
    assert redact("tokens: abc") == "tokens=…"


LONG = 300_000
NASTY = ["a", "a-", "a.", "aa://", "?key", "&a=", "eyJ-", "eyJa.", "bearer ", "bearer  ", "-----BEGIN ", "-----BEGIN A PRIVATE KEY-----",
         '"a', '"password": "', "\\", "http://a", "http://a@", "authorization: ", "authorization:" + " " * 50, "secret=", "sk-", " ",
         "'a ", "'a': 'b", "password ", "--token ", "a = ", "token:", "api_key", "'api_key' "]  # fmt: skip


@pytest.mark.timeout(120)  # what takes time by the square of the length takes hours here
@pytest.mark.parametrize("piece", NASTY)
def test_long_texts(piece: str) -> None:
    "A secret at the end of a long text is found, whatever comes before it."
    secret = "planted/value of a key"
    text = piece * (LONG // len(piece))
    shown = Redactor([secret], env={}).text(f"{text} {secret} https://ann:password@host")
    assert secret not in shown
    assert "password@" not in shown
    assert len(redact(text)) <= MAX_MESSAGE


@QUICK
@given(before=WORDS, secret=ALNUM.map(lambda s: f"{s}1aB9"), length=st.integers(0, 4000))
def test_an_error_message_keeps_no_part_of_a_secret(before: str, secret: str, length: int) -> None:
    "However long the message is, and wherever it is cut."
    message, parts = f"{before} {'x' * length} 'quoted {'y' * length}'", [secret[at : at + 8] for at in range(len(secret) - 7)]
    assume(not any(part in message for part in parts))  # eight letters of both, by chance
    shown = redact(f"{message} {secret}")
    assert not any(part in shown for part in parts)


def test_names() -> None:
    for name in ("password.value", "auth.user", "a.api_key.0"):
        assert is_secret_name(name)
