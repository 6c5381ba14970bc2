"""What the pages that open from disk share: their frame, and the pictures inside them.

A page fetches nothing and runs nothing, whatever the names and texts in it say: a policy in its
head forbids it. Its pictures are in the file.
"""

import base64

import cv2
import numpy as np


def whole_page(title: str, style: str, body: str) -> str:
    """Return an HTML document; ``title`` and ``body`` are HTML, ``style`` is CSS.

    >>> "default-src 'none'" in whole_page("Hats", "", "<h1>Hats</h1>")
    True
    """
    return _PAGE.format(title=title, style=style, body=body)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Return an image, uint8 [h, w, 3] RGB, as a JPEG file.

    >>> encode_jpeg(np.zeros((30, 20, 3), np.uint8), 85)[:2]
    b'\\xff\\xd8'
    """
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def jpeg_uri(image: np.ndarray, quality: int = 85) -> str:
    """Return a data URI of an image, uint8 [h, w, 3] RGB, as JPEG.

    >>> jpeg_uri(np.zeros((30, 20, 3), np.uint8))[:23]
    'data:image/jpeg;base64,'
    """
    return data_uri("image/jpeg", encode_jpeg(image, quality))


def data_uri(kind: str, content: bytes) -> str:
    """Return a file as the source of a picture.

    >>> data_uri("image/png", b"abc")
    'data:image/png;base64,YWJj'
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
