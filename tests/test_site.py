"""The site of docs/: it builds without a warning, and in a real browser it is what it should be at two widths."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md") if "_build" not in path.parts)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", "--virtual-time-budget=5000"]
FLAGS += [f"--disable-{name}" for name in ("gpu", "quic", "background-networking", "component-update", "sync")]
LOOK = """<script>addEventListener("load", () => {
  const found = {
    width: innerWidth,
    beyond: document.documentElement.scrollWidth - innerWidth,
    menu: document.querySelector(".sidebar-drawer").getBoundingClientRect().right > 0,
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    images: document.images.length,
  };
  document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
})</script>"""

pytestmark = pytest.mark.slow


def build(docs, out):
    pytest.importorskip("furo", reason='the site needs pip install "axolotl-cvloss[docs]"')
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", docs, out]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    built = build(DOCS, out)
    assert built.returncode == 0, built.stderr
    return out


def test_the_site_has_all_pages_and_a_search(site):
    assert [page for page in PAGES if not (site / f"{page}.html").exists()] == []
    assert "lovasz" in (site / "searchindex.js").read_text()


@pytest.mark.parametrize("link", ["nowhere.md", "key.md#nowhere", "../benchmarks/nowhere.md", "losses/nowhere.png"])
def test_a_dead_link_fails(tmp_path, link):
    shutil.copy(DOCS / "conf.py", tmp_path)
    (tmp_path / "index.md").write_text(f"# Start\n\n[here]({link})\n\n```{{toctree}}\nkey\n```\n")
    (tmp_path / "key.md").write_text("# The key\n\n[there](#the-key)\n")
    built = build(tmp_path, tmp_path / "out")
    assert built.returncode != 0
    assert re.search(r"index\.md:3: WARNING: .*nowhere", built.stderr)


def dom(address, width, home):
    command = [BROWSER, *FLAGS, f"--user-data-dir={home}", f"--window-size={width},900", "--dump-dom", address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


looked_at = pytest.mark.skipif(
    not (os.environ.get("LOOK_AT_SITE") and BROWSER),
    reason="no chromium on the PATH" if os.environ.get("LOOK_AT_SITE") else "asked for with LOOK_AT_SITE=1 alone",
)


@looked_at
@pytest.mark.parametrize(("width", "menu"), [(500, False), (1400, True)])
@pytest.mark.parametrize("page", ["index", "key", "losses/region", "compatibility", "evidence"])
def test_a_page_in_a_browser(site, tmp_path, page, width, menu):
    """Nothing sticks out of the window, pictures are there, and the menu where there is room for it."""
    there = site / f"{page}.looked-at.html"
    there.write_text((site / f"{page}.html").read_text().replace("</body>", f"{LOOK}</body>"))
    shown = dom(there.as_uri(), width, tmp_path / "browser")
    found = json.loads(unescape(re.findall(r'<pre id="found">(.*?)</pre>', shown)[-1]))  # the script is shown too
    assert found["width"] == width
    assert found["beyond"] <= 0
    assert found["broken"] == []
    assert found["menu"] == menu
    assert found["images"] or page in ("key", "compatibility")


@looked_at
def test_the_search_in_a_browser(site, tmp_path):
    shown = dom(f"{(site / 'search.html').as_uri()}?q=lovasz", 1400, tmp_path / "browser")
    assert "losses/ranking.html" in shown
