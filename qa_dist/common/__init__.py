"""What every room may use, and nothing about questions, models or ranks.

`errors`: the exceptions of the package, and who is to act on each; a `UserError` is a sentence without a traceback.
`command`: what every entry point does around its work: flags, the exit code, how an error ends it.
`signals`: signals that ask a program to stop, noted until it answers them at a good moment.
`secrets`: what looks like a token or password in a text, replaced by stars.
`reading`: files of users, plain or gzipped: their bytes, text or JSON, or one sentence on why not.
`parsers`: strict JSON and YAML: no key is lost to an equal one, no word becomes a number by surprise.
`files`: files and folders that appear whole or not at all; whether a folder can be written to, and who holds it.
`columns`: rows of text in columns as a terminal counts them, and sizes in MiB.
`hosts`: the name of this machine, and the machines that Slurm gave to this job.
`shipped`: where the recipes, configurations and scripts of the package lie, and which of them a name means.
`libraries`: errors of libraries in a few words; their log lines and bars held back.
`notebook`: for calls from Python: values that show as text, mistakes that name arguments instead of flags.
`arrays`: types of numpy arrays, by what their items are.
"""
