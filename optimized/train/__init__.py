"""`python -m optimized.train [TEXT ...]`: a language model of the causal layer, trained on text. See `job`.

`arguments` and `settings` say what is trained; `text`, `tokens` and `data` what on; `ranks`, `optimizer` and `trainer`
how; `files`, `checkpoints` and `saved` keep it; `law` holds it to being causal; `continuation` lets it write; `report`
and `curves` show it.
"""
