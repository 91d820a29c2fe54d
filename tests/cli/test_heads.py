"""`polyhead heads` with the real encoder: measured, compared, acted on, and what bad input is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from polyhead.errors import InputError
from polyhead.headmap import HeadMap

pytestmark = pytest.mark.real_model
MODEL = "all-MiniLM-L6-v2"


def run(*arguments: str):
    from polyhead.cli.app import app

    result = CliRunner().invoke(app, ["heads", *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def maps(tmp_path_factory, minilm_path):
    folder = tmp_path_factory.mktemp("maps")
    for score in ("gradient-importance", "ablation-importance"):
        run("measure", MODEL, score, "--data", "sts-2012", "--limit", "8", "--out", str(folder / f"{score}.json"))
    return folder / "gradient-importance.json", folder / "ablation-importance.json"


def test_list_names_every_score_with_its_paper():
    rows = {row["name"]: row for row in json.loads(run("list", "--json"))}
    assert rows["gradient-importance"]["papers"] == ["sixteen-heads"]
    assert rows["gradient-importance"]["needs"] == "task"
    assert "retrieval-heads" in run("list")


def test_measure_writes_shows_and_draws(maps, tmp_path):
    found = HeadMap.load(maps[0])
    assert found.shape == (6, 12)
    assert found.values.min() >= 0
    output = run(
        "measure", MODEL, "gradient-importance", "--data", "sts-2012", "--limit", "8", "--plot", str(tmp_path / "m.png")
    )
    layer, head = found.top(1)[0]
    assert f"L{layer}H{head}" in output
    assert (tmp_path / "m.png").stat().st_size > 5_000
    plain = json.loads(run("measure", MODEL, "gradient-importance", "--data", "sts-2012", "--limit", "8", "--json"))
    np.testing.assert_allclose(plain["values"], found.values, rtol=1e-4, atol=1e-9)


def test_compare(maps, tmp_path):
    a, b = (HeadMap.load(path) for path in maps)
    plain = json.loads(run("compare", *map(str, maps), "--json", "--plot", str(tmp_path / "s.png")))
    assert plain["spearman"] == pytest.approx(a.rank_correlation(b))
    assert plain["overlap"]["top 20%"] == pytest.approx(len(set(a.top(0.2)) & set(b.top(0.2))) / len(a.top(0.2)))
    assert (tmp_path / "s.png").is_file()


def test_act_measures_what_it_costs(maps, tmp_path):
    given = ("act", MODEL, "--evaluate", "sts-2015", "--limit", "24", "--draws", "2", "--json")
    gated = json.loads(run(*given, "--gate", str(maps[0]), "--fraction", "0.1"))
    assert [tuple(head) for head in gated["heads"]] == (-HeadMap.load(maps[0])).top(0.1)
    assert gated["difference"]["value"] == pytest.approx(gated["after"]["value"] - gated["before"]["value"])
    assert gated["before"]["low"] < gated["before"]["value"] < gated["before"]["high"]
    assert len(gated["random"]) == 2
    pruned = json.loads(run(*given, "--prune", str(maps[0]), "--fraction", "0.1", "--out", str(tmp_path / "small")))
    assert pruned["after"] == gated["after"]
    assert pruned["pruned"]["parameters after"] < pruned["pruned"]["parameters before"]
    assert (tmp_path / "small" / "config.json").is_file()


def test_steer_pushes_toward_texts(maps, tmp_path):
    (tmp_path / "toward.txt").write_text("The weather is cold.\nSnow fell all night.\n")
    report = json.loads(
        run(
            *("act", MODEL, "--steer", str(maps[0]), "--toward", str(tmp_path / "toward.txt"), "--strength", "4"),
            *("--evaluate", "sts-2015", "--limit", "16", "--draws", "0", "--json"),
        )
    )
    assert report["after"]["value"] != report["before"]["value"]


def test_bad_input_says_what_to_do(maps):
    with pytest.raises(InputError, match=r"No score 'gradient'\. Did you mean .*gradient-importance"):
        run("measure", MODEL, "gradient")
    with pytest.raises(InputError, match="2 actions were given; expected one"):
        run("act", MODEL, "--gate", str(maps[0]), "--prune", str(maps[0]))
    with pytest.raises(InputError, match="--steer needs --toward"):
        run("act", MODEL, "--steer", str(maps[0]))
    with pytest.raises(InputError, match=r"expected name=value"):
        run("measure", MODEL, "gradient-importance", "--set", "x")
    with pytest.raises(InputError, match=r"does not take nothing"):
        run("measure", MODEL, "gradient-importance", "--set", "nothing=1")
    with pytest.raises(InputError, match=r"fraction of 0\.001 of 72 heads is none"):
        run("act", MODEL, "--gate", str(maps[0]), "--fraction", "0.001")
