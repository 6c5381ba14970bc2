"""The page in Chromium: choose, box, filter, click through, enlarge, on a phone too."""

import contextlib
import shutil
import threading

import numpy as np
import pytest
from fakes import FakeEmbedder, make_shop

from cbam_jax.catalogue.alike import Alike

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'cbam_jax[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of twelve photos in a thread."""
    from cbam_jax.catalogue import server

    folder = tmp_path_factory.mktemp("shop")
    make_shop(folder)
    image, heat = np.full((64, 48, 3), 120, np.uint8), np.eye(64, 48, dtype=np.float32)
    alike = Alike(image, image, heat, heat)
    patch = pytest.MonkeyPatch()
    patch.setattr("cbam_jax.catalogue.catalogue.pair_heat", lambda *_: alike)
    listening = server.bound("127.0.0.1", 0)
    app = server.create_app(folder / "shop.db", FakeEmbedder(), hosts={"127.0.0.1"})
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", folder / "photos"
    running.should_exit = True
    thread.join()
    listening.close()
    patch.undo()


@contextlib.contextmanager
def opened(url, **options):
    """A page, what its console said, and the hosts that it asked."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**options)
        errors, hosts = [], set()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(url)
        yield page, errors, hosts
        browser.close()


def wait(page, script):
    """Wait until an expression holds; the page itself forbids what Playwright's own wait does."""
    for _ in range(300):
        if page.evaluate(script):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{script}: {page.inner_text('main')}")


def shows(page, condition):
    """Wait until it holds of what was found, ``text``, and of how many, ``many``."""
    wait(
        page,
        "() => { const list = document.getElementById('results'), text = list.innerText,"
        f" many = list.children.length; return {condition}; }}",
    )


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1200, "dark")])
def test_a_photo_is_chosen_boxed_filtered_clicked_and_enlarged(address, width, scheme):
    url, photos = address
    size = {"width": width, "height": 800}
    with opened(url, viewport=size, color_scheme=scheme) as (page, errors, hosts):
        page.set_input_files("#file", photos / "hat" / "03.png")
        shows(page, "many === 12 && text.includes('This photo, distance 0.0000, category: hat')")
        edges = page.locator("#frame").bounding_box()
        page.mouse.move(edges["x"] + 4, edges["y"] + 4)
        page.mouse.down()
        page.mouse.move(edges["x"] + 30, edges["y"] + 25)
        page.mouse.up()
        shows(page, "many === 12 && !text.includes('0.0000')")
        page.click("#clear")
        shows(page, "text.includes('0.0000')")
        page.select_option("#category", "dress")
        shows(page, "many === 6")
        page.select_option("#category", "")
        shows(page, "many === 12")
        page.locator(".find").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/#id=8")
        shows(page, "many === 11")
        page.locator(".more").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("#large").is_visible()
        page.keyboard.press("Tab")  # From the first button to the second, and back.
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        wait(page, "document.getElementById('why-text').innerText.startsWith('Red: the parts')")
        for name in ("query", "result"):
            wait(page, f"document.getElementById('why-{name}').naturalWidth === 48")
        assert not page.locator("#large-photo").is_visible()
        assert page.evaluate("document.activeElement.id") == "ask-why"
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.keyboard.press("Escape")
        assert not page.locator("#large").is_visible()
        page.locator(".more").nth(1).press("Enter")
        assert page.locator("#large-photo").is_visible()
        assert not page.locator("#why").is_visible()
        page.keyboard.press("Escape")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert (errors, hosts) == ([], {url.split("/")[2]})


def test_a_box_by_keyboard_and_a_file_that_is_no_photo(address, tmp_path):
    url, photos = address
    (tmp_path / "a.jpg").write_text("<html>")
    with opened(url) as (page, _, _):
        page.set_input_files("#file", photos / "hat" / "03.png")
        shows(page, "text.includes('0.0000')")
        page.click("#begin-box")
        shows(page, "many === 12 && !text.includes('0.0000')")
        before = page.locator("#box").bounding_box()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Shift+ArrowDown")
        after = page.locator("#box").bounding_box()
        assert after["x"] > before["x"]
        assert after["width"] == pytest.approx(before["width"], abs=1)
        assert after["height"] > before["height"]
        page.set_input_files("#file", tmp_path / "a.jpg")
        wait(page, "document.getElementById('error').innerText.includes('no photo')")


HANDED = """async (type) => {
  const photo = await (await fetch("/items/8/photo")).blob(), data = new DataTransfer();
  data.items.add(new File([photo], "a.jpg", { type: "image/jpeg" }));
  const options = { bubbles: true, cancelable: true };
  document.dispatchEvent(type === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, ...options })
    : new DragEvent(type, { dataTransfer: data, ...options }));
}"""


@pytest.mark.parametrize("events", [["dragover", "drop"], ["paste"]])
def test_a_photo_is_dropped_and_pasted(address, events):
    url, _ = address
    with opened(url) as (page, errors, hosts):
        for event in events:
            page.evaluate(HANDED, event)
        shows(page, "many === 12 && text.includes('category: hat')")
        assert page.locator("#preview").is_visible()
        assert (errors, hosts) == ([], {url.split("/")[2]})


def test_copies_are_one_unless_the_box_is_ticked(address):
    url, photos = address
    with opened(url) as (page, _, _):
        page.set_input_files("#file", photos / "hat" / "03.png")
        shows(page, "many === 12 && text.includes('This photo')")
        page.locator("#copies").focus()
        page.keyboard.press("Space")
        shows(page, "many === 12 && document.getElementById('status').innerText.startsWith('11')")
