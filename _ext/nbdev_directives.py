"""Sphinx extension: honour nbdev's `#|` directives, which MyST-NB would print as comments."""

import json
import re

TAGS = {"hide": "remove-cell", "default_exp": "remove-cell", "hide_input": "remove-input", "hide_output": "remove-output"}
DIRECTIVE = re.compile(r"^[ \t]*#\|[ \t]*(\w+)?.*\n?", re.MULTILINE)


def clean_cell(cell):
    "The cell without its directives, tagged for what they ask; in place."
    source = "".join(cell["source"])
    tags = cell["metadata"].setdefault("tags", [])
    wanted = {TAGS[name] for name in DIRECTIVE.findall(source) if name in TAGS}
    if "colab" in tags:
        wanted.add("remove-cell")
    tags.extend(sorted(wanted - set(tags)))
    cell["source"] = DIRECTIVE.sub("", source).strip("\n")
    if not cell["source"]:
        tags.append("remove-input")


def source_read(app, docname, source):
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            clean_cell(cell)
    source[0] = json.dumps(notebook)


def setup(app):
    app.connect("source-read", source_read)
    return {"version": "0.2", "parallel_read_safe": True, "parallel_write_safe": True}
