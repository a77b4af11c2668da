# The converter for jobs without a GPU.
#
#   docker build -t fp4moe .
#   docker run --rm -v /models:/models fp4moe ci nvidia/DeepSeek-V3-0324-FP4 /models/DeepSeek-V3-fp4moe
#
# The folder that is mounted is the one above the result, because the report lies beside that and has to stay as well.
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE /src/
COPY fp4moe_convert /src/fp4moe_convert
RUN pip install --no-cache-dir /src && rm -r /src
ENTRYPOINT ["fp4moe"]
