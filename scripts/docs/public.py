"""The public modules, their pages on the site, and their names and signatures as one text that is kept in the
repository.

Other modules may change at any time. `python -m scripts.docs.public` rewrites tests/docs/public_api.txt.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from scripts.docs.links import ROOT

LISTING = ROOT / "tests" / "docs" / "public_api.txt"
PUBLIC = {
    "configs": (
        "configs.schema",
        "configs.augment",
        "configs.clustering",
        "configs.data",
        "configs.guard",
        "configs.head",
        "configs.monitor",
        "configs.showing",
        "configs.load",
    ),
    "backbones": ("backbones", "backbones.base"),
    "partial_fc": (
        "partial_fc",
        "partial_fc.module",
        "partial_fc.optim",
        "partial_fc.head",
        "partial_fc.margins",
        "partial_fc.adaptive",
        "partial_fc.negatives",
        "partial_fc.sampling",
        "partial_fc.collectives",
        "partial_fc.reference",
        "sharding",
    ),
    "clustering": (
        "clustering.service.service",
        "clustering.kmeans",
        "clustering.method.gate",
        "clustering.method.hardness",
        "clustering.method.margins",
        "clustering.method.kappaface",
        "clustering.method.contrastive",
        "clustering.method.align",
        "clustering.report.find",
        "clustering.report.findings",
        "clustering.report.cleaning",
        "clustering.reference",
    ),
    "data": (
        "data.rec.records",
        "data.rec.recordio",
        "data.rec.header",
        "data.rec.index",
        "data.verification_bin",
        "data.making.pack",
        "data.making.sources",
        "data.checking.verify",
        "data.loading.loader",
        "data.loading.batch",
        "data.order.sampler",
        "data.synthetic",
    ),
    "evaluation": (
        "evaluation.verification",
        "evaluation.roc",
        "evaluation.bootstrap",
        "evaluation.pairs",
        "evaluation.ijb.ijb",
        "evaluation.identification",
        "evaluation.alignment",
        "evaluation.embed.embed",
        "evaluation.embed.records",
        "evaluation.export.export",
    ),
    "training": ("training.trainer", "training.step", "training.distributed", "training.checkpoint"),
}
"""Page of the site to modules."""
_INDEX = """# Python

Public are the modules below, and in them the names without a leading underscore. Their names and signatures are kept in
`tests/docs/public_api.txt`: a change that alters one shows it there, and in `CHANGELOG.md`. All other modules may
change without notice. Pages are made from the docstrings; names of tensors carry their shapes (`x_BD`, `w_CD`).

| module | |
|---|---|
"""


def modules() -> list[str]:
    """All of them."""
    return [module for group in PUBLIC.values() for module in group]


def path_of(module: str) -> Path:
    """Its file."""
    place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def pages() -> dict[str, str]:
    """Pages of docs/reference/api/, as the site has them: mkdocstrings fills them."""
    made, index = {}, [_INDEX.rstrip("\n")]
    for group, members in PUBLIC.items():
        made[f"reference/api/{group}.md"] = f"# {group}\n\n" + "\n".join(_shown(name, members) for name in members)
        for name in members:
            text = ast.get_docstring(ast.parse(path_of(name).read_text(encoding="utf-8"))) or ""
            first = " ".join(text.split("\n\n")[0].split())
            index.append(f"| [`{name}`]({group}.md#{name}) | {first.replace('|', chr(92) + '|')} |")
    return {"reference/api/index.md": "\n".join(index) + "\n", **made}


def _shown(module: str, members: tuple[str, ...]) -> str:
    """What mkdocstrings makes a module's part of. What it exports of a module that follows is shown there."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    elsewhere = [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module in members
        for alias in node.names
    ]
    hidden = f'\n    options:\n      filters: ["!^_", "!^({"|".join(elsewhere)})$"]' if elsewhere else ""
    return f"::: {module}{hidden}\n"


def listing() -> str:
    """A line for each public name: module, name, signature."""
    return "".join(f"{line}\n" for module in modules() for line in _lines(module))


def _lines(module: str) -> Iterator[str]:
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    exported = _exported(tree)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in exported:
                    yield f"{module}.{alias.asname or alias.name} is {node.module}.{alias.name}"
        else:
            yield from _of(node, module)


def _exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def _of(node: ast.stmt, prefix: str) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        if node.name.startswith("_") and node.name not in ("__init__", "__call__", "__enter__", "__len__", "__iter__"):
            return
        marks = "".join(f"@{ast.unparse(mark)} " for mark in node.decorator_list)
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.FunctionDef):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            yield f"{marks}{name}({ast.unparse(node.args)}){returns}"
        else:
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield f"{marks}{name}({bases})"
            for member in node.body:
                yield from _of(member, name)
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
        value = f" = {ast.unparse(node.value)}" if node.value else ""
        yield f"{prefix}.{node.target.id}: {ast.unparse(node.annotation)}{value}"
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        if not name.startswith("_"):
            yield f"{prefix}.{name} = {ast.unparse(node.value)}"


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
    print(f"{LISTING.relative_to(ROOT)}: {listing().count(chr(10))} names")
