"""What JSON answers hold; the OpenAPI page shows these."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Row(BaseModel):
    """A row of the database that an explanation rests on."""

    row: int = Field(description="its number in this database")
    id: str
    label: str
    distance: float = Field(description="squared L2 between the embeddings")


class Place(BaseModel):
    """From a map to its picture: x = x0 + (u + 0.5) scale_x, y = y0 + (v + 0.5) scale_y."""

    size: tuple[int, int] = Field(description="height and width of the picture, the right way up")
    x0: float
    y0: float
    scale_x: float
    scale_y: float


class Explained(BaseModel):
    """The explanation of a picture."""

    neighbors: list[Row] = Field(description="nearest first")
    flat: bool = Field(description="the map has no positive value")
    confidence: float | None = Field(
        description="how probable it is that the map shows its own class; after gcfast calibrate"
    )
    fidelity: float | None = Field(
        description="expected cosine with the picture's own map; after gcfast calibrate"
    )
    map_size: tuple[int, int] = Field(description="height and width of the map")
    place: Place | None = Field(description="null where a transform prepares pictures")
    database: str = Field(description="another text after any change of the database")
    overlay: str | None = Field(None, description="PNG in base64, where it is included")
    map: str | None = Field(None, description="npy, float32 [H, W], in base64")
    picture: str | None = Field(None, description="what the network saw, PNG in base64")
    neighbor: str | None = Field(
        None, description="the nearest row's picture as the network sees it, PNG in base64"
    )


class Pair(BaseModel):
    """The explanation of two pictures, from their own embeddings alone."""

    similarity: float = Field(description="cosine of the embeddings")
    rest: float = Field(description="of it, what no place of the picture accounts for")
    other_rest: float = Field(description="the same of the other picture")
    nearest: Row | None = Field(
        description="the row whose picture is the other one, where the request has no other"
    )
    map_size: tuple[int, int] = Field(description="height and width of either map")
    database: str = Field(description="another text after any change of the database")
    overlay: str | None = Field(None, description="PNG in base64, where it is included")
    other_overlay: str | None = Field(None, description="the same of the other picture")
    map: str | None = Field(None, description="npy, float32 [2, H, W], in base64")
    picture: str | None = Field(None, description="what the network saw, PNG in base64")
    other_picture: str | None = Field(None, description="the same of the other picture")


class Refused(BaseModel):
    """Why a request was refused."""

    detail: str
