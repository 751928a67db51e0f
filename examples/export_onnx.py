"""One ONNX graph that explains from any database of its model, run by ONNX Runtime."""

import numpy as np
import onnxruntime

import gcfast
from gcfast.demo.birds import as_batch, draw_bird
from gcfast.demo.network import load_network
from gcfast.explain.exported.onnx import table_inputs

loader = [(as_batch([draw_bird(y, seed=0, index=i) for i in range(6)]), [y] * 6) for y in range(5)]
explainer = gcfast.Explainer(load_network())
database = explainer.build(loader)
explainer.export_onnx("explainer.onnx", tables="inputs", center=1.0)

session = onnxruntime.InferenceSession("explainer.onnx")
tables = table_inputs(session, database)
images = as_batch([draw_bird(y, seed=1, index=0) for y in range(4)])
(maps,) = session.run(["maps"], {"images": images.numpy()} | tables)

wanted = explainer.explain_batch(images, center=1.0).numpy()
np.testing.assert_allclose(maps, wanted, atol=1e-5)
print("ONNX Runtime gives the same maps")
