"""Answers from a trained model: from one question to files of any size.

`reader` is what everybody calls: text in, answers out. `opening` finds out what a model's folder holds and makes the
`backend` that computes it, `torch_backend` with torch or `onnx_backend` without. `records` has what goes in and comes
out, `ranking` puts the candidates of several passages into one order. `pipeline` gives transformers its
question-answering pipeline back.

`prediction` answers files on any number of ranks: `question_files` reads them as a stream, `chunks` cuts it into what a
rank answers at a time, and `journal` lets a killed run go on.

A `terminal` shows answers in their `sentences`; the `server` answers over HTTP. `options` are those of the commands
that open a model.

`export` writes a model for other programs: a graph made in `onnx_graph`, described in `exported`, and compared.
"""
