"""Questions, from a source to checked examples.

What the rest of the package calls things:
    `records`: examples, features, candidates and predictions: the words that every room uses.

From a source to examples, in the order of the work:
    `sources`: what an option names: files, a folder, the hub, the sample, generated questions; the way in.
    `folders`: which files of a folder belong to a split, and folders that Hugging Face's datasets library saved.
    `formats`: JSON, JSONL, CSV and Parquet into values; a new kind of file is a row here.
    `layouts`: SQuAD, MRQA, Label Studio and others told by their shape; a new layout is a row here.
    `rows`: raw records, and tables in which each row is a question, whatever its columns are called.
    `values`: single cells: answers in every way they are written, ids, numbers that became texts.
    `literals`: lists and arrays that pandas wrote into cells as Python, read without running anything.
    `checking`: what makes a record invalid, and the report on all of them.
    `placing`: where an answer stands in its context, and offsets that count something else than characters.

Data that comes with the package, or is made and written:
    `sample`: the embedded questions, and synthetic ones with the lengths of SQuAD.
    `cloze`: questions made of plain text, by gaps in its sentences.
    `splitting`: a data set in two, by article, so that no context is on both sides.
    `squad_files`: questions written as SQuAD JSON, under a name that is checked first.
"""
