"""Answers from a trained model: from one question to files of any size.

Questions in, answers out:
    `reader`: what everybody calls: the windows, passes and decoding of an evaluation, for questions as they come.
    `records`: what goes in and what comes out.
    `opening`: from a model's name to what computes it, and to the settings of its run.
    `options`: flags of commands that open a model: which one, and what of its run's settings is to be otherwise.
    `backend`: what a reader asks of whatever computes: features in, candidates out.
    `torch_backend`: that with torch, by the code that evaluates a run.
    `onnx_backend`: that with onnxruntime and numpy, where torch is not installed.
    `onnx_sessions`: a graph that many threads may run at once.
    `ranking`: the n-best lists of several passages in one order.

Other ways to ask:
    `server`: answers over HTTP.
    `terminal`: what a conversation looks like to a person, or to a pipe.
    `sentences`: the sentence around an answer, fit for a terminal.
    `pipeline`: the question-answering pipeline that transformers had until version 5.
    `package_bases`: lets transformers open an adapter whose base is a folder in a Python package.

Files of questions, on any number of ranks:
    `prediction`: rank 0 reads and writes, every rank answers a chunk of each round.
    `question_files`: files of any size as a stream of lines, rows and records.
    `csv_rows`: rows of CSV from such a stream; a broken one does not spoil the next.
    `question_records`: what a line or row says: questions, or what is wrong with it.
    `passages`: several passages for one question: where a file may have them, and where not.
    `chunks`: questions checked, and cut into what a rank answers at a time.
    `journal`: answers on the disk, and how far they go, so that a killed run goes on.

A model for other programs:
    `export`: a trained model into a folder for onnxruntime, compared with itself before it counts.
    `exported`: what lies in such a folder, and the description that a reader needs.
    `onnx_graph`: the graph, made by torch's exporter, and its copy with 8 bits.
    `onnx_rewriting`: attention as one operation, and large channels made smaller before they are rounded.
    `weight_rounding`: weights as integers of 8 bits, chosen so that products change least (GPTQ).
"""
