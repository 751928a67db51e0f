"""An HTTP server that explains pictures: ``gcfast serve``, or the application for another server.

:func:`gcfast.serve.app.create_app` returns the application, :func:`gcfast.serve.server.run` serves
it. All of this package needs the extra ``serve``: importing it without is a
:class:`gcfast.errors.MissingExtraError`.
"""

from gcfast._extras import needs_extra

with needs_extra("serve", "gcfast.serve"):
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401
