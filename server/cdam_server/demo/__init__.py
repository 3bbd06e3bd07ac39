"""The demo: scenes of handwritten digits, a small ViT trained on them, and its held-out figures.

Nothing here needs a network or a download. Import what you need from the modules:

- `cdam_server.demo.scenes`: draws scenes with exact object masks (needs the `demo` extra)
- `cdam_server.demo.model`: builds and loads the shipped Vision Transformer
- `demo_model.figures`, `concepts`: measure the model, and how well concepts are found in scenes
- `demo_train`, `samples`: the commands that made what `assets/` holds, but for the figures (`tools/demo_figures.py`)
"""
