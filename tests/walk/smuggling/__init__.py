"""Request smuggling: framing.py and heads.py say what is sent and what must come of it, recorder.py sees what does."""
