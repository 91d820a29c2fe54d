"""``polyhead heads``: measure what heads do, compare measurements, act on heads and see what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from polyhead.cli.show import console, print_json, progress_bar
from polyhead.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from polyhead.evaluate.actions import ActionReport
    from polyhead.headmap import HeadMap
    from polyhead.heads import Score
    from polyhead.model import HeadedModel

app = typer.Typer(no_args_is_help=True, help="Measure what heads do, compare measurements, and act on heads.")
JSON = typer.Option(False, "--json", help="Print JSON on standard output and nothing else.")


@app.command("list")
def list_scores(json_output: bool = JSON) -> None:
    """List every score: what it measures, what it needs, and its papers."""
    from rich.table import Table

    from polyhead.heads import scores

    rows: list[dict[str, Any]] = [
        {"name": name, "needs": kind.needs, "summary": kind.summary, "papers": list(getattr(kind, "__papers__", ()))}
        for name, kind in scores().items()
    ]
    if json_output:
        print_json(rows)
        return
    table = Table("score", "needs", "what it measures", "paper", box=None)
    for row in rows:
        table.add_row(row["name"], row["needs"], row["summary"], ", ".join(row["papers"]))
    console.print(table)


@app.command("measure")
def measure(
    model: str = typer.Argument(..., help="Model name, folder or .gguf file; see `polyhead models`."),
    score: str = typer.Argument(..., help="Name of a score; see `polyhead heads list`."),
    data: str = typer.Option(None, "--data", help="ag-news, sts-2012 to sts-2015, or a file with one text a line."),
    limit: int = typer.Option(64, "--limit", min=1, help="Texts or pairs used."),
    settings: list[str] = typer.Option(None, "--set", help="A knob of the score as name=value; may be given again."),
    out: Path = typer.Option(None, "--out", help="Write the HeadMap here, as JSON."),
    plot: Path = typer.Option(None, "--plot", help="Draw the heatmap here: .png, .svg, .pdf."),
    json_output: bool = JSON,
) -> None:
    """Measure every head of a model: a table, the top heads in words, and on request a file and a heatmap.

    Example: `polyhead heads measure all-MiniLM-L6-v2 gradient-importance --data sts-2012 --plot map.png`
    """
    chosen = _score(score, settings or [])
    from polyhead.model import load_with_head

    headed = load_with_head(model)
    with progress_bar("Measuring", "steps") as progress:
        found = chosen.score(headed, _data(chosen, headed, data, limit), progress=progress)
    if out is not None:
        found.save(out)
    if plot is not None:
        found.plot(plot)
    if json_output:
        print_json(found.to_json())
        return
    _show_map(found)


@app.command("compare")
def compare(
    first: Path = typer.Argument(..., help="A HeadMap written by `heads measure --out`."),
    second: Path = typer.Argument(..., help="Another of the same model."),
    plot: Path = typer.Option(None, "--plot", help="Draw the scatter plot here."),
    json_output: bool = JSON,
) -> None:
    """Compare two measurements of one model: rank correlation, and how many of the top heads they share.

    Example: `polyhead heads compare gradient.json ablation.json --plot scatter.png`
    """
    from polyhead.headmap import HeadMap

    a, b = HeadMap.load(first), HeadMap.load(second)
    result = {
        "first": a.name,
        "second": b.name,
        "spearman": a.rank_correlation(b),
        "overlap": {f"top {share:.0%}": a.overlap(b, share) for share in (0.05, 0.1, 0.2)},
    }
    if plot is not None:
        a.plot_against(b, plot)
    if json_output:
        print_json(result)
        return
    console.print(f"{a.name} and {b.name}: Spearman rank correlation {result['spearman']:.3f}", highlight=False)
    for share, part in result["overlap"].items():  # type: ignore[attr-defined]
        console.print(f"  {share}: {part:.0%} of the heads are the same", highlight=False)


@app.command("act")
def act(
    model: str = typer.Argument(..., help="Model name, folder or .gguf file."),
    gate: Path = typer.Option(None, "--gate", help="Switch off heads chosen by this HeadMap."),
    prune: Path = typer.Option(None, "--prune", help="Remove the weights of heads chosen by this HeadMap."),
    steer: Path = typer.Option(None, "--steer", help="Add vectors to heads chosen by this HeadMap; needs --toward."),
    toward: Path = typer.Option(None, "--toward", help="With --steer: texts, one a line, to push the heads toward."),
    away: Path = typer.Option(None, "--away", help="With --steer: texts to push away from."),
    strength: float = typer.Option(1.0, "--strength", help="With --steer: times the vector."),
    fraction: float = typer.Option(0.2, "--fraction", help="Share of the heads acted on."),
    highest: bool = typer.Option(False, "--highest", help="Take the highest heads of the map instead of the lowest."),
    evaluate: str = typer.Option(None, "--evaluate", help="Task: sts-2012 to sts-2015, ag-news, or a file of texts."),
    limit: int = typer.Option(500, "--limit", min=2, help="Pairs or texts of the task."),
    draws: int = typer.Option(5, "--draws", min=0, help="Draws of as many random heads, for comparison."),
    out: Path = typer.Option(None, "--out", help="With --prune: save the smaller model to this folder."),
    seed: int = typer.Option(0, "--seed", help="Of the sample, the random heads and the bootstrap."),
    json_output: bool = JSON,
) -> None:
    """Act on heads that a HeadMap chooses, and measure what it costs or gains on a task, with its interval.

    Example: `polyhead heads act all-MiniLM-L6-v2 --gate importance.json --fraction 0.2 --evaluate sts-2015`
    """
    from polyhead.evaluate.actions import chosen_heads, measure_action
    from polyhead.headmap import HeadMap
    from polyhead.heads import task_for

    given = {name: path for name, path in (("gate", gate), ("prune", prune), ("steer", steer)) if path is not None}
    if len(given) != 1:
        raise InputError(f"{len(given)} actions were given; expected one of --gate, --prune or --steer with a HeadMap.")
    [(name, path)] = given.items()
    if out is not None and name != "prune":
        raise InputError("--out saves a pruned model; give it with --prune.")
    if (name == "steer") != (toward is not None):
        raise InputError("--steer needs --toward FILE (texts, one a line), and --toward is for --steer only.")
    head_map = HeadMap.load(path)
    from polyhead.model import load_with_head

    headed = load_with_head(model)
    heads = chosen_heads(head_map, fraction, highest=highest)
    task = task_for(headed, evaluate, limit=limit, seed=seed)
    put = _putter(name, headed, toward, away, strength)
    with progress_bar("Measuring", "runs") as progress:
        report = measure_action(headed, task, heads, put, name=name, draws=draws, seed=seed, progress=progress)
    pruned = _prune(headed, heads, out) if name == "prune" else None
    if json_output:
        print_json({**report.to_json(), "map": head_map.name, "pruned": pruned})
        return
    _show_report(report, head_map, highest)
    if pruned:
        said = (f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}" for key, value in pruned.items())
        console.print("  " + ", ".join(said), highlight=False)


def _score(name: str, settings: list[str]) -> Score:
    from polyhead.heads import scores

    known = scores()
    if name not in known:
        import difflib

        near = [one for one in known if name in one][:3] or difflib.get_close_matches(name, known, 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"No score '{name}'.{hint} `polyhead heads list` names all {len(known)}.")
    knobs: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} was given; expected name=value.")
        knobs[key] = _plain(value)
    try:
        return known[name](**knobs)
    except TypeError as error:
        raise InputError(f"The score '{name}' does not take {', '.join(knobs)}: {error}.") from error


def _plain(value: str) -> Any:
    import json

    try:
        return json.loads(value)
    except ValueError:
        return value


def _data(score: Score, model: HeadedModel, name: str | None, limit: int) -> Any:
    """What a score needs, by its kind; None lets the score take its own default."""
    from polyhead.data import load_texts
    from polyhead.heads import task_for

    if score.needs == "task":
        return task_for(model, name, limit=limit)
    if score.needs == "texts":
        return load_texts(name or "ag-news", limit)
    if name is not None:
        raise InputError(
            f"--data {name} was given, but '{score.name}' needs {score.needs}, not texts: leave --data away for its "
            "default, or call it from Python with your own."
        )
    return None


def _show_map(found: HeadMap, top: int = 10) -> None:
    from rich.markup import escape
    from rich.table import Table

    layers, heads = found.shape
    console.print(
        f"[bold]{escape(found.name)}[/]  {escape(found.model)}  [dim]{escape(found.data)}[/]", highlight=False
    )
    if heads <= 16:
        shown, scale = _scaled(found.values)
        table = Table("layer", *[str(head) for head in range(heads)], box=None, padding=(0, 1, 0, 0), title=scale)
        for layer in range(layers):
            table.add_row(str(layer), *["" if value != value else f"{value:.2f}" for value in shown[layer]])
        console.print(table)
    else:
        console.print(f"{layers} layers x {heads} heads: --plot draws them, --json prints them.", highlight=False)
    console.print(escape(found.in_words(top)), highlight=False)


def _scaled(values: np.ndarray) -> tuple[np.ndarray, str | None]:
    """Values with their common power of ten taken out, so that two decimals show them; and what to multiply by."""
    import numpy as np

    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    if largest == 0 or 0.1 <= largest < 100:
        return values, None
    power = int(np.floor(np.log10(largest)))
    return values / 10.0**power, f"values x 1e{power}"


def _putter(name: str, model: HeadedModel, toward: Path | None, away: Path | None, strength: float) -> Any:
    from polyhead.act import Gate

    if name in ("gate", "prune"):  # pruned weights and closed gates give the same outputs, tested to 1e-5
        return lambda heads: Gate.off(heads, model).on(model)
    from polyhead.act import Steer, mean_heads
    from polyhead.data import load_texts

    assert toward is not None
    vectors = mean_heads(model, load_texts(str(toward)))
    if away is not None:
        vectors = vectors - mean_heads(model, load_texts(str(away)))
    return lambda heads: Steer(vectors, strength, heads).on(model)


def _prune(model: HeadedModel, heads: list[tuple[int, int]], out: Path | None) -> dict[str, Any]:
    from polyhead.compress import prune, save_pruned

    smaller, report = prune(model, heads)
    found: dict[str, Any] = {
        "parameters before": report.before.parameters,
        "parameters after": report.after.parameters,
        "difference from gating": report.parity,
    }
    if out is not None:
        found["saved to"] = str(save_pruned(smaller, out))
    return found


def _show_report(report: ActionReport, head_map: HeadMap, highest: bool) -> None:
    end = "highest" if highest else "lowest"
    console.print(
        f"[bold]{report.action}[/] the {len(report.heads)} {end} heads of {head_map.name} in {report.model}, judged by "
        f"{report.metric} on {report.task}",
        highlight=False,
    )
    for label, value in (("before", report.before), ("after", report.after), ("difference", report.difference)):
        console.print(f"  {label:<11} {value.value:+.4f}  ({value.low:+.4f} to {value.high:+.4f})", highlight=False)
    if report.beats_random is not None:
        mean = sum(report.random) / len(report.random)
        beats = report.beats_random
        console.print(
            f"  random      {mean:+.4f}  mean of {len(report.random)} draws of as many heads; the chosen ones end "
            f"{beats.value:+.4f} from it ({beats.low:+.4f} to {beats.high:+.4f})",
            highlight=False,
        )
    console.print("  [dim]95% bootstrap intervals over the examples[/]")
