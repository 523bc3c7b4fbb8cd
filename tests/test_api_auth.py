"""Tokens and htpasswd files of a KMS's listeners: what admits, and every file that cannot be used."""

import asyncio
from pathlib import Path

import pytest

from dstack_emu.transport.api_auth import Credentials
from dstack_emu.transport.errors import ConfigError

APACHE = "$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC"
"""The bcrypt hash of `myPassword` in Apache's own documentation of the file."""
OTHER = "$2b$04$Ml8Kico791rV.ybQUF8xi.VCi/3xB0UKwiTWo9L59/hMIRfBuls62"
"""The hash of `pw`, by libxcrypt."""


def credentials(folder: Path, text: str, token: str = "") -> Credentials:
    """Read a file of users."""
    path = folder / "users"
    path.write_text(text)
    return Credentials.of([token], str(path), "core.admin.htpasswd_file")


def admits(known: Credentials, user: str, password: str) -> bool:
    return asyncio.run(known.admit_basic(user, password))


def test_users_of_a_file_are_admitted_by_their_own_password(tmp_path: Path) -> None:
    known = credentials(tmp_path, f"# operators\n\nmyName:{APACHE}\r\nother:{OTHER}\nmyName:{OTHER}\n")
    assert admits(known, "myName", "myPassword")
    assert admits(known, "other", "pw")
    assert admits(known, "myName", "pw")  # every line of a user counts
    for user, password in (("other", "myPassword"), ("myname", "pw"), ("myName", ""), ("", "pw"), ("myName", APACHE)):
        assert not admits(known, user, password)
    assert not known.admit_token("pw")
    assert not known.admit_token("")


def test_password_counts_up_to_72_bytes(tmp_path: Path) -> None:
    bcrypt = pytest.importorskip("bcrypt")
    long = "é" * 36
    known = credentials(tmp_path, f"long:{bcrypt.hashpw(long.encode(), bcrypt.gensalt(4)).decode()}\n")
    assert admits(known, "long", long)
    assert admits(known, "long", long + "more")
    assert not admits(known, "long", long[:-1])


def test_token_is_the_password_or_the_user_alone(tmp_path: Path) -> None:
    known = credentials(tmp_path, f"myName:{APACHE}", token=" s3cret\n")
    assert known.admit_token("s3cret")
    assert admits(known, "anyone", "s3cret")
    assert admits(known, "s3cret", "")
    assert admits(known, "myName", "myPassword")
    for user, password in (("s3cret", "x"), ("", ""), ("s3cre", "")):
        assert not admits(known, user, password)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "htpasswd file {} contains no users"),
        ("# nobody\n  \n", "htpasswd file {} contains no users"),
        (f"myName:{APACHE}\nno colon", "invalid htpasswd entry in {}, line 2: user:hash expected"),
        ("joe:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "unsupported htpasswd entry for 'joe' in {}, line 1; only"),
        (
            "joe:$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/",
            "unsupported htpasswd entry for 'joe' in {}, line 1; only",
        ),
        (f":{APACHE}", "unsupported htpasswd entry for '' in {}, line 1; only"),
        (f"joe:{APACHE[:-1]}", "unsupported htpasswd entry for 'joe' in {}, line 1; only"),
        (f" # not a comment:{APACHE[:-1]}", "unsupported htpasswd entry for ' # not a comment' in {}, line 1"),
    ],
)
def test_file_that_cannot_be_used_is_named_without_its_hashes(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        credentials(tmp_path, text)
    words = str(refusal.value)
    assert words.startswith("core.admin.htpasswd_file: " + said.format(tmp_path / "users"))
    assert APACHE[7:50] not in words
    assert credentials(tmp_path, f"joe:{APACHE}").are_configured


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="failed to read htpasswd file .*/absent: No such file or directory"):
        Credentials.of([], str(tmp_path / "absent"), "core.admin.htpasswd_file")


def test_hash_of_a_cost_that_bcrypt_does_not_have_admits_nobody(tmp_path: Path) -> None:
    known = credentials(tmp_path, f"joe:$2y$39${APACHE[7:]}")
    assert not admits(known, "joe", "myPassword")


def test_credentials_are_in_no_text_of_themselves(tmp_path: Path) -> None:
    known = credentials(tmp_path, f"myName:{APACHE}", token="s3cret")
    assert "s3cret" not in repr(known)
    assert "myName" not in repr(known)
