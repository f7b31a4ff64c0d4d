"""A bare FastAPI process: FOLDER PORT."""

import sys

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, Request

options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(f"{sys.argv[1]}/model.onnx", options)
app = FastAPI()


@app.post("/predict")
async def predict(request: Request):
    rows = np.array((await request.json())["instances"], dtype=np.float32)
    return {"predictions": session.run(None, {"x": rows})[0].tolist()}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
