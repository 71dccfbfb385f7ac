"""Secrets among the options reach no file and no message."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from slime_opd.config import command_line, parse, to_yaml
from slime_opd.config.checks import problems
from slime_opd.config.redact import check_no_mask, redact_urls, redacted

SECRET = "hunter2"
WORDS = f"""--rm-url http://me:{SECRET}@teacher:13141/generate --use-opd --opd-type sglang --wandb-host https://{SECRET}@wandb.local
--sglang-api-key {SECRET} --sglang-ssl-keyfile-password {SECRET} --sglang-mem-fraction-static 0.5 --hf-checkpoint s --input-key api_key"""
CONFIG = parse(WORDS.split())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:pw@h:1/generate", "http://***@h:1/generate"),
        ("HTTPS://token@h/generate", "HTTPS://***@h/generate"),
        ("http://me:p/w@x@h:1/generate", "http://***@h:1/generate"),  # not a valid URL, and still a password
        ("see http://a:b@h and http://c@d/x", "see http://***@h and http://***@d/x"),
        ("http://h:1/generate", "http://h:1/generate"),
        ("me@h", "me@h"),
        ("", ""),
    ],
)
def test_the_user_info_of_a_url_is_replaced(url, shown):
    assert redact_urls(url) == shown


def test_no_secret_is_in_anything_that_is_written():
    for written in (to_yaml(CONFIG), json.dumps(dataclasses.asdict(redacted(CONFIG)))):
        assert SECRET not in written
        assert "http://***@teacher:13141/generate" in written
    assert yaml.safe_load(to_yaml(CONFIG))["sglang-api-key"] == ["***"]


def test_all_other_options_are_kept():
    safe = redacted(CONFIG)
    assert safe.data.input_key == "api_key"  # the name of a column
    assert safe.sglang["mem-fraction-static"] == ("0.5",)
    assert redacted(safe) == safe
    assert dataclasses.replace(CONFIG, reward=safe.reward, observe=safe.observe, sglang=safe.sglang) == safe
    plain = parse(["--rm-url", "http://h:1/generate"])
    assert redacted(plain) == plain


def test_a_redacted_file_asks_for_the_secrets_again(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(CONFIG))
    found = check_no_mask(parse(["--config", str(file)]))
    assert [problem.split(":")[0] for problem in found] == [
        "--rm-url",
        "--wandb-host",
        "--sglang-api-key",
        "--sglang-ssl-keyfile-password",
    ]
    given = parse(["--config", str(file), *WORDS.split()])
    assert given == CONFIG and check_no_mask(given) == []


def test_the_message_about_a_malformed_address_has_no_secret():
    arguments = ["--use-opd", "--opd-type", "sglang", "--rm-url", f"http://me:{SECRET}/x@h/generate?key={SECRET}"]
    found = [problem for problem in problems(parse(arguments)) if "--rm-url" in problem]
    assert len(found) == 1 and SECRET not in found[0]


def test_no_message_about_the_command_line_has_a_secret(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["train", "--rm-ulr", f"http://me:{SECRET}@h/generate", "--lr", f"http://me:{SECRET}@h"]
    )
    with pytest.raises(SystemExit):
        command_line(parse)
    message = capsys.readouterr().err
    assert "http://***@h" in message and SECRET not in message
