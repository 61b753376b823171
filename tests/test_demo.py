"""The demonstration runs, shows what it promises, and fails loudly where it should."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the demonstration trains on scikit-learn's digits")
pytest.importorskip("matplotlib", reason="the demonstration draws its curves")
pytest.importorskip("tqdm", reason="the demonstration shows a progress bar")

from benchmarks import demo, demo_check, demo_methods, demo_model
from wsam_fused import backends

_FUSED = backends.select("auto", torch.device("cpu"), torch.float32).name != "eager"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _tables(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the cells of the two tables, without their headers."""
    found: list[list[list[str]]] = [[], []]
    table = -1
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|:-"):
            continue
        if cells[0] == "method":
            table += 1
        elif line.startswith("|"):
            found[table].append(cells)
    return found[0], found[1]


def test_quick_run_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "curves.png"
    threads = torch.get_num_threads()
    status = demo.main(["--quick", "--out", str(picture)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert torch.get_num_threads() == threads
    assert picture.read_bytes().startswith(_PNG_SIGNATURE)
    trained, checked = _tables(shown.out)
    assert [row[0] for row in trained] == ["SGDM", "SAM", "WSAM"]
    for method, accuracy, loss, sharpness, step, optimizer, backend in trained:
        assert float(accuracy.rstrip("%")) > 50.0, method
        assert 0.0 < float(loss) < 1.5
        assert float(sharpness) > 0.0
        assert 0.0 < float(optimizer) < float(step)
        assert backend in ("torch", *backends.BACKENDS)
    assert trained[0][-1] == "torch"
    assert "no evidence" in shown.out
    assert "100%" in shown.err  # of the progress bar
    if not _FUSED:
        return
    pairs = itertools.product(demo_check.CHECKED, ("SGDM", "AdamW"))
    assert [tuple(row[:2]) for row in checked] == list(pairs)
    for method, base, float64, float32, bound, ratio, verdict in checked:
        assert verdict == "same", (method, base)
        assert float(float64) < 1e-9
        assert float(float32) <= float(bound) < 0.1
        assert float(ratio) > 0.0


@pytest.mark.skipif(not _FUSED, reason="there is no fused backend to compare")
def test_wrong_fused_step_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = demo_methods.build_optimizer

    def build_wrong(method: str, base: str, net: torch.nn.Module, backend: str) -> object:
        optimizer = build(method, base, net, backend)
        if (method, base, backend) == ("WSAM", "AdamW", "auto"):
            optimizer.param_groups[0]["lr"] *= 1.0001
        return optimizer

    monkeypatch.setattr(demo_methods, "build_optimizer", build_wrong)
    assert demo.main(["--quick", "--epochs", "1", "--out", str(tmp_path / "demo.png")]) == 1
    complaint = capsys.readouterr().err
    assert "FAILED" in complaint
    assert re.findall(r"(\S+) with (\S+) ends elsewhere", complaint) == [("WSAM", "AdamW")]


def test_no_fused_backend_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = backends.Choice("eager", "cpu: not compiled")
    monkeypatch.setattr(backends, "select", lambda *args, **kwargs: choice)
    assert demo_check.check(["SAM"], seed=0, steps=1) == []
    assert "NOT CHECKED" in capsys.readouterr().out


@pytest.mark.parametrize("method", demo_methods.METHODS)
def test_every_method_trains_and_is_checked(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--epochs", "2", "--out", str(tmp_path / "demo.png")]
    assert demo.main([*options, "--method", method]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    trained, checked = _tables(shown)
    assert [row[0] for row in trained] == list(dict.fromkeys(["SGDM", "SAM", method]))
    assert f"\n{method}: rho " in shown
    first, last = float(trained[0][2]), float(trained[-1][2])
    assert last < 2.2 and first < 2.2  # ln 10 is what knowing nothing gives
    assert 0.0 < float(trained[-1][5]) < float(trained[-1][4])
    if _FUSED:
        assert [row[:2] for row in checked] == [[method, "SGDM"], [method, "AdamW"]]


def test_the_clock_counts_the_passes_of_losses_once() -> None:
    net = torch.nn.Linear(4, 10)
    optimizer = demo_methods.build_optimizer("RWSAM", "SGDM", net, "eager")
    whole, own = demo_methods.train_step(
        "RWSAM", net, optimizer, torch.randn(6, 4), torch.arange(6)
    )
    assert 0.0 < own < whole


def test_same_seed_gives_the_same_run() -> None:
    data = demo_model.load()
    runs = [
        demo_model.train(
            "WSAM", data, epochs=1, seed=3, backend="auto", after_epoch=lambda history: None
        )
        for _ in range(2)
    ]
    assert runs[0].train_loss == runs[1].train_loss
    assert runs[0].sharpness == runs[1].sharpness


def test_sharpness_leaves_the_weights() -> None:
    data, net = demo_model.load(), demo_model.build_net(0)
    before = [param.detach().clone() for param in net.parameters()]
    assert demo_model.sharpness(net, data) > 0.0
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epochs", "0"], ["--epochs", "0 is out of range", "[1, 1000]"]),
        (["--epochs", "many"], ["--epochs", "'many' is no number", "[1, 1000]"]),
        (["--seed", "-1"], ["--seed", "-1 is out of range", "[0, 4294967295]"]),
        (["--method", "XSAM"], ["--method", "'XSAM'", "GSAM"]),
        (["--backend", "abacus"], ["--backend", "'abacus'", "eager"]),
        (["--out", "curves.jpg"], ["--out", "'curves.jpg'", ".png"]),
        (["--out", f"{__file__}/demo.png"], ["--out", "demo.png", "no folder"]),
        (["--speed", "9"], ["unrecognized arguments", "--speed"]),
    ],
)
def test_wrong_argument_is_named(
    argv: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(argv)
    assert stopped.value.code == 2
    complaint = capsys.readouterr().err
    for part in expected:
        assert part in complaint


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--method", "--epochs", "--seed", "--backend", "--out", "--quick", "--no-check"):
        assert option in text
