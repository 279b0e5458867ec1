"""The page of one or several runs. Imports arguments, configuration, data, retrieval (for neighbours alone), utils.

read.py         open_runs(folders)          what a run has written, and what is wrong with it
series.py       curve(lines, ...)           numbers over steps, exactly as they were logged
charts.py       loss_charts(runs), ...      which charts there are, and what each one shows
lengths.py      length_charts(runs)         how long the texts are, from the token stores
neighbours.py   find(runs, sample)          what the last models find for sample queries; loads models
compare.py      rows(configurations)        keys and values beside each other, and where they differ
summary.py      tiles(runs)                 the few numbers at the top
page.py         page(...)                   all of it as one HTML file

The charts are drawn in the browser by the three scripts in assets/, 600 lines without a library. A page of its own
kind is the smaller evil: plotly.js is 4 MB a file; uPlot is 50 KB but draws on a canvas, whose lines a test cannot
count, a print blurs and a dark page does not recolour. SVG that Python writes could not change to a log scale, smooth,
or fit a phone. The numbers lie in the page as JSON, so that they can be read out of it again.
"""
