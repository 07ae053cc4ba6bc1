"""Sphinx extension: leave out thebe, which Jupyter Book loads on every page and which lives on a CDN."""


def is_thebe(script):
    name = str(getattr(script, "filename", script) or "")
    return "thebe" in name or "THEBE_JS_URL" in str(getattr(script, "attributes", {}).get("body", ""))


def page_context(app, pagename, templatename, context, doctree):
    context["script_files"][:] = [s for s in context["script_files"] if not is_thebe(s)]


def setup(app):
    app.connect("html-page-context", page_context, priority=999)
    return {"version": "0.1", "parallel_read_safe": True, "parallel_write_safe": True}
