"""How well the demo model, and concepts of it, do on scenes that training never saw."""
