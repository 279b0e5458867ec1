"""The page of one or several runs, of which tools/report.py is the command. Nothing else imports it.

read.py         open_runs(folders)          what a run has written, and what is wrong with it
series.py       plain_curve(lines, key)     numbers over steps, exactly as they were logged
evaluation.py   history(run), chosen(run)   evaluations and results.json: set, dimension, metric
charts.py       loss_section(runs), ...     which charts there are, and what each one shows
stores.py       length_section(runs, ...)   how long the texts are, from the token stores
neighbours.py   answer(runs, sample)        what the last models find for sample queries; loads models
compare.py      configuration_groups(...)   keys and values beside each other, and where they differ
summary.py      tiles(runs)                 the few numbers at the top
tables.py       key_table(...), ...         tables and cards as HTML
page.py         page(runs)                  all of it as one HTML file

Only neighbours.py imports what imports torch, and only when it is asked: the rest takes less time than that import.

The charts are drawn in the browser by the scripts in assets/, without a library. plotly.js would put 4 MB into every
page; uPlot is 50 KB, but draws on a canvas: a test cannot count its lines, a print blurs, and colours do not follow a
dark page. SVG written by Python could not change to a log scale, smooth, or fit a phone. The numbers lie in the page as
JSON, so that they can be read out of it again.
"""
