"""The program `latentflow app`."""

from __future__ import annotations

from typing import Any

import pytest

from latentflow.errors import UserError


def test_everybody_is_let_in_with_a_warning_or_a_password(load_program, monkeypatch, capsys) -> None:
    pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[app]"')
    from latentflow.web import inference_server, serving

    served: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.delenv("LATENTFLOW_APP_AUTH", raising=False)
    monkeypatch.setattr(inference_server, "InferenceServer", lambda *arguments: None)
    monkeypatch.setattr(serving, "serve", lambda _, host, port, **settings: served.append((host, settings)))
    program = load_program("app")
    program.main(["--host", "0.0.0.0"])
    assert "--auth USER:PASSWORD" in capsys.readouterr().err
    program.main([])
    program.main(["--host", "0.0.0.0", "--auth", "anna:a:b", "--allowed-host", "a.example", "b.example"])
    monkeypatch.setenv("LATENTFLOW_APP_AUTH", "ben:c")
    program.main(["--host", "0.0.0.0"])
    program.main(["--auth", "anna:a"])
    assert capsys.readouterr().err == ""
    assert served == [
        ("0.0.0.0", {"auth": None, "allowed_hosts": ()}),
        ("127.0.0.1", {"auth": None, "allowed_hosts": ()}),  # this machine alone
        ("0.0.0.0", {"auth": ("anna", "a:b"), "allowed_hosts": ("a.example", "b.example")}),
        ("0.0.0.0", {"auth": ("ben", "c"), "allowed_hosts": ()}),
        ("127.0.0.1", {"auth": ("anna", "a"), "allowed_hosts": ()}),
    ]
    for auth in ("anna", "anna:", ":a", " :a"):
        with pytest.raises(UserError, match="USER:PASSWORD"):
            program.main([f"--auth={auth}"])


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_that_is_none_is_refused(load_program, port) -> None:
    with pytest.raises(UserError, match=f"--port is {port}\nUse 1 to 65535"):
        load_program("app").main([f"--port={port}"])
