"""The interactive viewer of a page: NiiVue, as its npm package ships it, and what starts it.

The library is no part of this repository: ``cli/report/fetch_viewer.py`` puts it beside this
module, once, as a step of the build. It is used only if its hash is the one that is pinned here,
and nothing is ever fetched while a page is made or looked at.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

from medmamba.errors import EnvironmentFault, SecurityError

NIIVUE_PACKAGE = "@niivue/niivue"
NIIVUE_VERSION = "0.69.0"
NIIVUE_MEMBER = "package/dist/niivue.umd.js"
NIIVUE_PACKAGE_SHA256 = "6e9a6a471b428eb3b258a0086beca9187d95e43a781a39e8a519c6da246af485"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"

FOLDER = Path(__file__).parent / "niivue"
NIIVUE_FILE = FOLDER / "niivue.umd.js"
LICENCES_FILE = FOLDER / "LICENSES.txt"

STARTER = """
(() => {
  const data = [...document.querySelectorAll("script[data-volume]")];
  const works = document.createElement("canvas").getContext("webgl2") !== null;
  for (const note of document.querySelectorAll("[data-needs-webgl]")) note.hidden = works;
  if (!works) return;
  let shown = null;
  const close = () => {
    if (shown === null) return;
    shown.panel.remove();
    shown.viewer.gl?.getExtension("WEBGL_lose_context")?.loseContext();
    shown.button.hidden = false;
    shown = null;
  };
  const choice = (title, names, act) => {
    const select = document.createElement("select");
    select.title = title;
    names.forEach((name, index) => select.add(new Option(name, String(index))));
    select.addEventListener("change", () => act(Number(select.value)));
    return select;
  };
  const open = async (block, button) => {
    close();
    const content = JSON.parse(block.textContent);
    const panel = document.createElement("div"), bar = document.createElement("div");
    const stage = document.createElement("div"), place = document.createElement("output");
    const canvas = document.createElement("canvas");
    panel.className = "viewer"; bar.className = "bar"; stage.className = "stage";
    const viewer = new niivue.Niivue({
      isRadiologicalConvention: true, dragAndDropEnabled: false, multiplanarShowRender: 1,
      show3Dcrosshair: true, crosshairColor: [1, 1, 1, 1], crosshairWidth: 1,
      sagittalNoseLeft: true, logLevel: "error", loadingText: "",
      onLocationChange: where => {
        const label = where.values[where.values.length - 1];
        const name = label === undefined ? "" : content.names[Math.round(label.value)] ?? "";
        place.textContent = name;
      },
    });
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: "0", max: "1", step: "0.05", value: "0.5" });
    slider.title = "opacity of the labels";
    slider.addEventListener("input", () => {
      viewer.setOpacity(viewer.volumes.length - 1, Number(slider.value));
    });
    const views = choice("what is shown", ["planes and volume", "axial", "coronal", "sagittal",
      "volume"], at => viewer.setSliceType([3, 0, 1, 2, 4][at]));
    const end = document.createElement("button");
    end.type = "button"; end.textContent = "close"; end.addEventListener("click", close);
    bar.append(views, slider, place, end);
    stage.append(canvas);
    panel.append(bar, stage);
    button.after(panel);
    button.hidden = true;
    shown = { panel, viewer, button };
    await viewer.attachToCanvas(canvas);
    const load = (base64, name, more) => niivue.NVImage.loadFromBase64({ base64, name, ...more });
    if (content.image) {
      viewer.addVolume(await load(content.image, "image.nii.gz", { cal_min: 0, cal_max: 255 }));
    }
    const labels = await load(content.labels, "labels.nii.gz", { opacity: 0.5 });
    labels.setColormapLabel(content.table);
    viewer.addVolume(labels);
    viewer.setSliceType(3);
    viewer.scene.crosshairPos = viewer.mm2frac(content.middle);
    viewer.updateGLVolume();
    viewer.createOnLocationChange();
    panel.dataset.ready = "yes";
  };
  for (const block of data) {
    const button = document.createElement("button");
    button.type = "button"; button.className = "open";
    button.textContent = "turn and scroll";
    button.addEventListener("click", () => open(block, button));
    block.after(button);
    if (location.hash === "#view-" + block.dataset.volume) open(block, button);
  }
})();
"""
"""Buttons appear only where the browser can draw; without them the static pictures are all there
is. ``#view-ANCHOR`` behind the page's address opens the viewer of that case."""

VIEWER_STYLE = """
.viewer .stage { position: relative; height: 440px; background: #000; border-radius: 6px;
  overflow: hidden; }
.viewer .bar { display: flex; gap: 12px; align-items: center; margin: 0 0 8px; }
.viewer output { color: var(--soft); flex: 1; }
.viewer { margin: 0 0 14px; }
button, select { font: inherit; font-size: 13px; padding: 3px 12px; border-radius: 8px;
  border: 1px solid var(--line); background: var(--ground); color: var(--ink); cursor: pointer; }
button.open { margin: 0 0 12px; } details pre { white-space: pre-wrap; font-size: 11.5px; }
"""


def require_viewer() -> str:
    """Return the library's source, ready to stand in a page.

    Raises:
        EnvironmentFault: it was not fetched when this package was installed.
        SecurityError: the file is another one than that which is pinned.
    """
    try:
        content = NIIVUE_FILE.read_bytes()
    except OSError as problem:
        raise EnvironmentFault(
            f"--report-interactive: the viewer NiiVue {NIIVUE_VERSION} is not part of this "
            f"installation ({NIIVUE_FILE} cannot be read). Run 'make viewer' where medmamba is "
            "installed from, or leave the option away: pictures are in every report.",
            code="E_NO_VIEWER",
        ) from problem
    found = hashlib.sha256(content).hexdigest()
    if found != NIIVUE_SHA256:
        raise SecurityError(
            f"{NIIVUE_FILE}: is not NiiVue {NIIVUE_VERSION} (SHA-256 {found[:16]}..., expected "
            f"{NIIVUE_SHA256[:16]}...). Remove it and run 'make viewer'.",
            code="E_VIEWER_HASH",
        )
    return _for_a_page(content.decode("utf-8"))


@cache
def licences() -> str:
    """The licences of the library and of what is bundled in it."""
    return LICENCES_FILE.read_text(encoding="utf-8")


def policy_hash(script: str) -> str:
    """What a content security policy calls a script of a page."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _for_a_page(script: str) -> str:
    """Keep strings of the source from being taken for the tags of a page, at the same meaning."""
    return script.replace("<script", "\\x3cscript").replace("</script", "\\x3c/script")
