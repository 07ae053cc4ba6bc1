"""Sphinx extension: each page gets only the scripts that it uses.

Jupyter Book puts thebe on every page, which would come from a CDN, and a site-wide plotly.min.js (5 MB)
would be loaded by pages without a plotly figure.
"""


def wanted(script, body):
    name = str(getattr(script, "filename", script) or "")
    text = str(getattr(script, "attributes", {}).get("body", ""))
    if "thebe" in name or "THEBE_JS_URL" in text:
        return False
    return "plotly" not in name or "Plotly." in body


def page_context(app, pagename, templatename, context, doctree):
    body = context.get("body") or ""
    context["script_files"][:] = [script for script in context["script_files"] if wanted(script, body)]


def setup(app):
    app.connect("html-page-context", page_context, priority=999)
    return {"version": "0.1", "parallel_read_safe": True, "parallel_write_safe": True}
