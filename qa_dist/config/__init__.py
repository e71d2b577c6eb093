"""Every option of a run: what it means, which values it may have, and what contradicts it.

To add one, or to look one up: the file of its group, a dataclass.

`options`: the four groups put together as a `RunConfig`, and what contradicts between groups.
`option`: how a single one is written down: its default, help and range.
`data_options`: where examples come from, how many of them, and how they become features.
`model_options`: which encoder, how it is loaded, and what of it is trained.
`training_options`: steps, batches and precision; what is evaluated, kept and written meanwhile.
`evaluation_options`: how logits become answers, and by whose rules these are scored.
`answer_rules`: the names of those rules.
`optimizers`: the table behind `--optim`: whatever differs between two optimisers is in their rows.
`parsing`: flags, a recipe and defaults into one configuration, with all problems said at once.
`given`: which flags a command line has, asked before all of it is read; those without effect refused.
`recipe_files`: recipes, and the config.yaml of a run, read and written.
`texts`: values as help and messages show them, and text as numbers.
`added_options`: what stands for an option that a file is too old to name.
`removed_options`: options that only files of earlier versions name, and what becomes of them.
"""
