"""The scripts that draw interactive figures: Vega, Vega-Lite and Vega-Embed, in one file, from vl-convert, which carries them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from testbed import files
from testbed.models.sources import cache_directory

_NAMES = (
    "window.vegaEmbed = vegaEmbed; window.vega = vega; window.vegaLite = vegaLite;"  #: as the page calls them
)


def bundle() -> str:
    """As text that may stand in a page's `<script>`; empty where vl-convert is not installed. Made once a version, then kept in
    the cache directory."""
    try:
        name = version("vl-convert-python")
    except PackageNotFoundError:
        return ""
    kept = cache_directory() / "vega" / f"{name}.js"
    try:
        return kept.read_text(encoding="utf-8")
    except OSError:
        pass
    import vl_convert

    made = vl_convert.javascript_bundle(_NAMES).replace("</script", "<\\/script")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.replace(kept, made.encode())
    except OSError:
        pass  # made anew next time
    return made
