"""`dfc verify`: a package's bytes, its weights' digests, and its proof, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfc.cli.options import Device, Json, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError


def verify(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="A package folder.", show_default=False)
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", metavar="NAMES", help="Engines to prove, or all; default: its own."
        ),
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="sha256:...", help="The digest that it must have."),
    ] = None,
    device: Device = "cpu",
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a package and prove it again here.

    \b
    Examples:
      dfc verify encoder.dfcpkg
      dfc verify encoder.dfcpkg --engine eager,onnxruntime --json
    """
    from dfc.cli.progress import Progress

    load_used(use)
    with Progress() as say:
        data = _verify(package, engine, expect, device, say)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(data)
    else:
        _print(package, data)
    wrong = [e for e in data["engines"] if not e["agrees"]]
    if wrong:
        raise DfcError(
            "V033", f"engine `{wrong[0]['engine']}` gives other results: {wrong[0]['reason']}"
        )


def _verify(
    package: str, engines: str | None, expect: str | None, device: str, say: Any
) -> dict[str, Any]:
    from dfc.manifest import check_manifest

    say(f"checking the bytes of {package}")
    wanted = expect.removeprefix("sha256:") if expect else None
    manifest = check_manifest(package, kind="package", expect=wanted)
    say("loading PyTorch")
    from dfc.cli.engines import chosen_engines
    from dfc.package import check_weights, read_package
    from dfc.planning.torch_device import check_device

    held = read_package(Path(package))
    say("checking the digests of the weights")
    check_weights(held.graph)
    names = chosen_engines(held.engine if engines is None else engines)
    check_device(device)
    without = [p.name for p in held.graph.parameters.values() if p.data is None]
    reason = ""
    if without:
        reason = f"it holds no weights (`{without[0]}`)"
    elif not held.probes:
        reason = "it holds no probes"
    proofs = [] if reason else [_prove(package, name, device, say) for name in names]
    return {
        "package": package,
        "sha256": manifest["self_sha256"],
        "files": len(manifest["files"]),
        "bytes": sum(f["size"] for f in manifest["files"]),
        "weights": sum(p.data is not None for p in held.graph.parameters.values()),
        "probes": len(held.probes),
        "recorded": sum(p.original is not None for p in held.probes),
        "unproved": reason or None,
        "engines": proofs,
    }


def _prove(package: str, engine: str, device: str, say: Any) -> dict[str, Any]:
    """Run the probes on one engine and judge them as `compile` did."""
    import dfc
    from dfc.cli.prove import largest_error
    from dfc.recipe.bench import judge_engine, standard_on

    say(f"proving on {engine}")
    compiled = dfc.load(package, engine=engine, device=device)
    standard = standard_on(compiled.device, compiled.standard(), compiled.graph)
    verdict = judge_engine(standard, compiled.graph, compiled.run_flat, compiled.report.rtol)
    worst = largest_error(compiled)
    return {
        "engine": compiled.engine.name,
        "agrees": verdict.agrees,
        "reason": str(verdict.difference) if verdict.difference else "",
        "largest_error": worst.to_data() if worst else None,
        "largest_error_text": str(worst) if worst else _why_none(compiled.probes),
    }


def _why_none(probes: Any) -> str:
    if any(p.original is None for p in probes):
        return "unknown: the original's results are not in the package"
    return "none: it has no numbers to compare"


def _print(package: str, data: dict[str, Any]) -> None:
    from dfc.cli.tables import bytes_text, print_text

    print_text(
        f"{package}: {counted(data['files'], 'file')}, {bytes_text(data['bytes'])}, as listed"
    )
    print_text(f"  digest sha256:{data['sha256']}")
    held = counted(data["weights"], "weight has the digest", "weights have the digests")
    print_text(f"  {held} that the graph names")
    if data["unproved"]:
        print_text(f"  unproved: {data['unproved']}")
    bare = data["probes"] - data["recorded"]
    if bare and data["engines"]:
        print_text(
            f"  of {counted(bare, 'probe')} it holds inputs alone, since the results are large "
            "beside its weights: they are computed by its graph"
        )
    for e in data["engines"]:
        verdict = "proved again" if e["agrees"] else "WRONG"
        print_text(
            f"  {verdict} on {e['engine']} with {counted(data['probes'], 'probe')}; "
            f"largest error against the original {e['largest_error_text']}"
        )
