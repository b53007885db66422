"""Certificates: found out before anything starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from narrowboat.errors import CertificateError
from narrowboat.serve.guard.tls import load_identity
from serve_guard_kit import make_certificate


def dated(folder: Path, begin: str, end: str) -> tuple[Path, Path]:
    """A certificate for some other time, and its key."""
    _, key = make_certificate(folder)
    made, asked, config = (folder / name for name in ("dated.pem", "dated.csr", "ca.cnf"))
    config.write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={folder}/index.txt\nserial={folder}/serial\nnew_certs_dir={folder}\n"
        "default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n"
    )
    (folder / "index.txt").write_text("")
    (folder / "serial").write_text("01\n")
    for command in (
        f"req -new -key {key} -out {asked} -subj /CN=localhost",
        f"ca -batch -config {config} -selfsign -keyfile {key} -in {asked} -out {made} -notext "
        f"-startdate {begin} -enddate {end}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return made, key


def test_a_certificate_with_its_key_is_taken(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    identity = load_identity(certificate, key)
    assert identity.expires.endswith("GMT")
    assert b"PRIVATE KEY" in identity.key and "PRIVATE" not in repr(identity)


def test_one_that_an_authority_signed_is_taken_too(tmp_path: Path) -> None:
    authority, authority_key = make_certificate(tmp_path, "authority")
    signed, key, asked = (tmp_path / name for name in ("leaf.pem", "leaf.key", "leaf.csr"))
    for command in (
        f"req -newkey rsa:2048 -nodes -keyout {key} -out {asked} -subj /CN=localhost",
        f"x509 -req -in {asked} -CA {authority} -CAkey {authority_key} -CAcreateserial -days 2 -out {signed}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    key.chmod(0o600)
    load_identity(signed, key)


def test_missing_files_are_named(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    with pytest.raises(CertificateError, match=r"none\.pem"):
        load_identity(tmp_path / "none.pem", key)
    with pytest.raises(CertificateError, match=r"none\.key"):
        load_identity(certificate, tmp_path / "none.key")
    with pytest.raises(CertificateError, match="no file"):
        load_identity(tmp_path, key)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    certificate, key = make_certificate(tmp_path)
    key.chmod(mode)
    with pytest.raises(CertificateError, match="chmod 600"):
        load_identity(certificate, key)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    certificate, _ = make_certificate(tmp_path)
    _, other = make_certificate(tmp_path, "other")
    with pytest.raises(CertificateError, match="not the key of"):
        load_identity(certificate, other)


@pytest.mark.parametrize("swapped", ["certificate", "key", "both"])
def test_files_that_hold_something_else_are_refused(tmp_path: Path, swapped: str) -> None:
    certificate, key = make_certificate(tmp_path)
    if swapped != "key":
        certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    if swapped != "certificate":
        key.write_text("hello\n")
    with pytest.raises(CertificateError):
        load_identity(certificate, key)


def test_a_key_with_a_password_is_refused_without_asking_for_it(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-in", key, "-out", locked, "-aes256", "-passout", "pass:secret"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    locked.chmod(0o600)
    with pytest.raises(CertificateError, match="without a password"):
        load_identity(certificate, locked)


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="expired"):
        load_identity(*dated(tmp_path, "20200101000000Z", "20210101000000Z"))


def test_one_that_is_not_yet_valid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="not yet valid"):
        load_identity(*dated(tmp_path, "20900101000000Z", "20910101000000Z"))


def test_one_that_is_not_for_servers_is_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "client", "-days", "2", "-addext", "extendedKeyUsage=clientAuth")
    with pytest.raises(CertificateError, match="purpose"):
        load_identity(certificate, key)
