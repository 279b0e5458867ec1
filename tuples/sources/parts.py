"""Sources read by several jobs: pieces are dealt by bytes, kept in one folder, and joined to what one run would write.

    OUTPUT/.pieces/NAME/00000/     a piece of the source NAME (tuples/sources/rows.py)

Which rows a piece has does not depend on the number of parts, and tuples are made of all pieces in their order: so the
result cannot depend on it either.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data.raw_rows import RawError
from tuples.sources.description import Source
from tuples.sources.reading import Piece, rows_of
from tuples.sources.rows import VERSION, is_written, write_piece

PIECES = ".pieces"


def part_of(pieces: list[Piece], parts: int) -> list[int]:
    """The part, from 1, that each piece is dealt to: neighbours together, by bytes.

    A piece goes where its middle lies when all bytes are cut into equal parts.
    """
    total = sum(piece.size for piece in pieces)
    dealt = []
    before = 0
    for piece in pieces:
        dealt.append(1 + (2 * before + piece.size) * parts // (2 * total))
        before += piece.size
    return dealt


def folder_of(output: Path, source: Source, piece: Piece) -> Path:
    """Where a piece is kept."""
    return output / PIECES / source.name / f"{piece.number:05}"


def identity_of(source: Source, piece: Piece) -> dict:
    """What the content of a piece depends on."""
    return {"version": VERSION, "description": asdict(source), **piece.identity()}


def read_pieces(pieces: list[Piece], sources: list[Source], output: Path) -> list[str]:
    """Read and keep those pieces that are not there yet; why some could not be read, a line each."""
    problems = []
    total = sum(piece.size for piece in pieces)
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        for piece in pieces:
            source = sources[piece.source]
            folder, identity = folder_of(output, source, piece), identity_of(source, piece)
            if not is_written(folder, identity):
                rows = rows_of(source, piece)
                rows = tqdm(rows, piece.input.name, unit="row", unit_scale=True, disable=None, leave=False)
                try:
                    write_piece(folder, rows, source, piece.input_number, piece.input.name, identity)
                except RawError as error:
                    problems += [f"{source.name}: {piece.input.name}: {line}" for line in str(error).splitlines()]
            bar.update(piece.size)
    return problems


def missing_parts(pieces: list[Piece], sources: list[Source], output: Path, parts: int) -> list[int]:
    """The parts, from 1, of which some piece is not there or was made from something else."""
    missing = set()
    for piece, part in zip(pieces, part_of(pieces, parts), strict=True):
        source = sources[piece.source]
        if not is_written(folder_of(output, source, piece), identity_of(source, piece)):
            missing.add(part)
    return sorted(missing)
