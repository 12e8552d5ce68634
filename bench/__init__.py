"""The load run: what a request costs here, beside the bare upstream and nginx. `python -m bench`; see README.md."""
