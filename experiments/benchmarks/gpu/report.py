"""The results as a table in Markdown."""
from typing import Any


def head(found: dict[str, Any]) -> str:
    """The machine and the peaks, in a few lines."""
    peaks, machine = found["peaks"], found["machine"]
    lines = [f"{name}: {value}" for name, value in machine.items() if value is not None]
    lines.append(f"peaks ({peaks['source']}): {peaks['flops'] / 1e12:,.3g} TFLOP/s in bfloat16, "
                 f"{peaks['bytes_per_s'] / 1e12:.3g} TB/s")
    if found["tests"] is not None:
        lines.append(f"tests: {found['tests']['said']}")
    return "\n".join(f"- {line}" for line in lines)


def table(results: list[dict[str, Any]]) -> str:
    """One row for each thing that was timed, or left out with the reason."""
    rows = ["| what | who | tokens/s | ms | host ms | of the roofline | memory, GB |", "|---|---|---|---|---|---|---|"]
    for each in results:
        if "why" in each:
            rows.append(f"| {each['what']} | {each['who']} | {each['why']} | | | | |")
            continue
        share, host, peak = each.get("of_roofline"), each.get("host_seconds"), each.get("peak_bytes")
        cells = [each["what"], each["who"], f"{each['tokens_per_s']:,.0f}", f"{1000 * each['seconds']:,.2f}",
                 "" if host is None else f"{1000 * host:,.2f}", "" if share is None else f"{100 * share:.0f} %",
                 "" if peak is None else f"{peak / 1e9:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
        if "model_tokens_per_s" in each:
            rows.append(f"| {each['what']} | the model's passes alone | {each['model_tokens_per_s']:,.0f} | | | | |")
    return "\n".join(rows)


def kernels(results: list[dict[str, Any]]) -> str:
    """Where the time of our steps goes."""
    lines = []
    for each in results:
        if each.get("kernels"):
            lines += ["", f"{each['what']}, {each['who']}:", ""]
            lines += [f"- {100 * kernel['share']:.0f} %, {kernel['calls']:.0f} calls: `{kernel['name']}`"
                      for kernel in each["kernels"]]
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """All of it."""
    parts = ["# On a GPU", head(found), table(found["results"]), "## Kernels of a step", kernels(found["results"])]
    return "\n\n".join(parts).rstrip() + "\n"
