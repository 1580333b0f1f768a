from embedding_pipeline.cli import main

main(prog_name="embedding-pipeline")
