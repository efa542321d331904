"""The offline stage: raw text in, memory-mapped token shards out.

    reading → tokens → units → sharding

`reading` turns the files that a user names into documents and reports what became of each; `tokens` turns the text of a
document into the ids of its sentences; `units` makes the shards of one work unit, in the format of
`ds_roberta.data.shards`; `dedup` finds documents that occur again; `sharding` makes a data folder of all units, under
a job that `jobs` keeps on disk and spreads over processes. `prepared` is what can be done with the result. `commands`
are the two ways through all this as functions, `cli` is the `preprocess` command.
"""
