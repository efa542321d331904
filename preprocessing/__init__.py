"""The offline stage: raw text in, memory-mapped token shards out.

    reading → tokens → units → sharding

`reading` turns the files that a user names into documents and reports what became of each; `tokens` turns the text of a
document into the ids of its sentences; `units` makes the shards of one work unit, in the format of
`ds_roberta.data.shards`; `dedup` finds repeated documents; `sharding` makes a data folder from all units, as a job that
`jobs` keeps on disk and spreads over processes. `prepared` inspects, exports and imports data folders. `commands` has
the two main commands as functions, and `cli` is the `preprocess` command.
"""
