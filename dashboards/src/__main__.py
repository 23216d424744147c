"""`python -m dashboards.src` writes charts/trellis/dashboards, from where chart, compose and k8s take them."""

from __future__ import annotations

from dashboards.src import FOLDER, dashboards

if __name__ == "__main__":
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)  # noqa: T201
