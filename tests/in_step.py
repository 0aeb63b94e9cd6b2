"""Check that the exported package, the cleaned notebooks and README.md are what the notebooks say.

`python tests/in_step.py` changes nothing that was in step and exits 1 with the list of files that were not;
`--write-readme` writes README.md from `nbs/index.ipynb`.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOTE = "<!-- Made from nbs/index.ipynb by `make export`; do not edit. -->\n\n"


def snapshot() -> dict[str, str]:
    "The digest of each file that export and clean may write."
    files = [p for d in ("llmbot", "nbs") for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".ipynb")]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def readme() -> str:
    "README.md as the index notebook gives it, through nbconvert, which needs no Quarto."
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    shown = [c for c in notebook.cells if not c.source.startswith("#| hide")]
    for cell in shown:
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
    notebook.cells = shown
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    return NOTE + "\n".join(line.rstrip() for line in body.strip().splitlines()) + "\n"


def main() -> int:
    if "--write-readme" in sys.argv:
        README.write_text(readme(), encoding="utf-8")
        return 0
    before = snapshot()
    for tool in ("nbdev_export", "nbdev_clean"):
        subprocess.run([str(Path(sys.executable).with_name(tool))], cwd=ROOT, check=True)
    after = snapshot()
    stale = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if README.read_text(encoding="utf-8") != readme():
        stale.append("README.md")
    for name in stale:
        print(f"not in step with the notebooks: {name} (run `make export` and commit)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
