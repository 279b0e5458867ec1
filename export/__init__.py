"""Folders that other programs load: written, described, read back, merged. Imports modeling, model, utils.

model_folder.py   a model folder, written
saved_in.py       the model folder that is meant where a run's was given
probe.py          read back, and compared with the live model
model_card.py     its README.md
card_usage.py     of which: how the model is used
card_results.py   of which: its figures
card_update.py    figures put into the card of a finished folder
adapter.py        a LoRA adapter's folder, loaded
convert.py        a folder in another form: merged, shortened, another dtype
onnx_file.py      as ONNX
hub.py            pushed to the Hugging Face hub
"""
