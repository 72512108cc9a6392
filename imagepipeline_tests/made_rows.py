"""Fills a catalogue with many images in seconds, as if they had been processed over time."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from imagepipeline.models import ASSETS
from imagepipeline.stores.catalogue import Catalogue

PENDING, FAILED = 1000, 2000  # the newest images wait; so many others have failed
IMAGE_ID = "'made-' || made.n"
RUN_ID = "'1a7ee7c4-8e90-4e9e-b024-' || (100000000000 + made.n)"
SERIES = {
    "sqlite": "WITH RECURSIVE made(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM made "
    "WHERE n < {count}) {{insert}}",
    "postgresql": "WITH made(n) AS (SELECT generate_series(1, {count})) {{insert}}",
}
SERIES_BETWEEN = {
    "sqlite": "WITH RECURSIVE made(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM made "
    "WHERE n < :last)",
    "postgresql": "WITH made(n) AS (SELECT generate_series(:first, :last))",
}
MOMENT = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%S.000000', '{start}', '+' || (made.n * {step}) "
    "|| ' seconds')",
    "postgresql": "timestamp with time zone '{start}+00' + made.n * {step} * interval '1 second'",
}
METADATA = '{"description": "A cat sits on a red sofa beside a window, looking out at the rain.", '
METADATA += '"tags": ["cat", "sofa", "window", "rain", "indoor"], "category": "animal", '
METADATA += '"dominantColors": ["#aa3322", "#112233", "#ccbbaa"], "mood": "calm"}'

SETTINGS = {
    "metadata": "prompt-12345678",
    "variants": "640-webp-80,640-avif-63,1024-webp-80,1024-avif-63,1920-webp-80,1920-avif-63",
    "embedding": "",
}
STORY = [
    *(("completed", "NULL"), ("accepted", "NULL"), ("claimed", "NULL")),
    *(("made", f"'{asset} by local:a-model:{SETTINGS[asset]}'") for asset in ASSETS),
]


def make_rows(
    url: str,
    count: int,
    days: float = 30,
    is_lean: bool = False,
    pending: int = PENDING,
    in_dagster: int | None = None,
) -> None:
    """Adds `count` images of the last days with their results, variants, history and calls.

    Args:
        url: the catalogue's.
        count: how many images.
        days: over which they came.
        is_lean: they have one result and one row of history, and no variants, text or placeholder.
        pending: how many of them wait.
        in_dagster: how many of the newest ones Dagster has; None for all that have ended.
    """
    with closing(Catalogue(url)) as catalogue:
        catalogue.migrate()
    variants, events, assets = (0, 1, ASSETS[:1]) if is_lean else (6, 6, ASSETS)
    placeholder, metadata = ("", "{}") if is_lean else ("A" * 150, METADATA)
    engine = sa.create_engine(url)
    dialect = engine.dialect.name
    start = datetime.now(UTC) - timedelta(days=days)
    moment = MOMENT[dialect].format(start=f"{start:%F %T}", step=days * 86_400 / count)
    series = SERIES[dialect].format(count=count)
    image_id, run_id = IMAGE_ID, RUN_ID
    first_pending = count - pending
    first_gone = 0 if in_dagster is None else count - in_dagster
    status = (
        f"CASE WHEN made.n > {first_pending} THEN 'pending' "
        f"WHEN made.n % {max(1, count // FAILED)} = 0 THEN 'failed' ELSE 'completed' END"
    )
    sha256 = "(1000000000000000 + made.n) || '" + "0123456789abcdef" * 3 + "'"
    statements = [
        "INSERT INTO images (id, status, generation, fence, priority, attempts, run_id, path, "
        "requested_path, pushes, pushes_seen, original_bytes, original_sha256, width, height, "
        "placeholder, dominant_color, metadata, reason, error, beat, accepted_at, "
        "accepted_generation, updated_at, in_dagster, in_dagster_since) "
        f"SELECT {image_id}, {status}, 1, 1, 0, 1, {run_id}, 'original/' || "
        f"{image_id} || '.jpg', CASE WHEN made.n % 2 = 0 THEN 'original/' || {image_id} || '.jpg' "
        f"END, 1, 1, 3000000, {sha256}, 4000, 3000, "
        f"'data:image/webp;base64,{placeholder}', '#aa3322', '{metadata}', "
        f"CASE WHEN ({status}) = 'failed' THEN 'provider_unavailable' END, "
        f"CASE WHEN ({status}) = 'failed' THEN 'it was down' END, 5, {moment}, 1, {moment}, "
        f"CASE WHEN ({status}) <> 'pending' AND made.n > {first_gone} THEN 'runs' END, {moment} "
        "FROM made",
        *(
            "INSERT INTO image_results (image_id, asset, generation, provider, model, settings, "
            f"input_sha256, made_at) SELECT {image_id}, '{asset}', 1, 'local', 'a-model', "
            f"'{SETTINGS[asset]}', {sha256}, {moment} FROM made WHERE made.n <= {first_pending}"
            for asset in assets
        ),
        *(
            "INSERT INTO image_variants (id, image_id, width, height, format, path, size, recipe) "
            f"SELECT {image_id} || '-{number}-webp', {image_id}, 640, 480, 'webp', "
            f"'variants/' || {image_id} || '-{number}.webp', 20000, '640-webp-80' FROM made "
            f"WHERE made.n <= {first_pending}"
            for number in range(variants)
        ),
        *(
            "INSERT INTO image_history (at, image_id, generation, fence, run_id, event, detail) "
            f"SELECT {moment}, {image_id}, 1, 1, "
            f"{run_id if event == 'claimed' else 'NULL'}, '{event}', {detail} FROM made"
            for event, detail in STORY[:events]
        ),
        "INSERT INTO provider_calls (at, image_id, generation, stage, provider, model, outcome, "
        f"tokens_in, tokens_out, cost_usd, seconds, waited_seconds) SELECT {moment}, {image_id}, "
        "1, 'metadata', 'openai', 'a-model', 'answered', 900, 90, 0.001, 1.5, 0 FROM made",
        "INSERT INTO events (event_id, image_id, generation, type, at, payload, stream_sent_at) "
        f"SELECT 'made-' || made.n, {image_id}, 1, 'image.completed', {moment}, '{METADATA}', "
        f"{moment} FROM made WHERE made.n > {count * (1 - min(1, 3 / days))}",
    ]
    with engine.begin() as connection:
        if dialect == "postgresql":  # what is made is consistent: it need not be checked
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        for statement in statements:
            # SQLite wants WITH after INSERT INTO … (columns), Postgres takes it there, too.
            insert, _, select = statement.partition(" SELECT ")
            statement = f"{insert} {series.format(insert=f'SELECT {select}')}"
            escaped = statement.replace("%", "%%") if dialect == "postgresql" else statement
            connection.exec_driver_sql(escaped)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE" if dialect == "postgresql" else "ANALYZE")
    engine.dispose()


def copy_in_dagster(
    events_url: str, runs_url: str, image_id: str, run_id: str, numbers: range
) -> None:
    """Gives images of `make_rows` the run of a real one, with its events, and their partitions.

    Args:
        events_url: Dagster's database of events, as a SQLAlchemy URL.
        runs_url: that of runs, which may be the same.
        image_id: the real image; nothing else in its events is called so.
        run_id: its run.
        numbers: of the made images.
    """
    made = {
        "image_id": image_id,
        "run_id": run_id,
        "first": numbers.start,
        "last": numbers.stop - 1,
    }
    text = f"replace(replace({{0}}, :run_id, {RUN_ID}), :image_id, {IMAGE_ID})"
    columns = {
        "event_logs": "run_id event dagster_event_type timestamp step_key asset_key partition",
        "dynamic_partitions": "partitions_def_name partition create_timestamp",
        "runs": "run_id snapshot_id pipeline_name mode status run_body partition partition_set "
        "create_timestamp update_timestamp start_time end_time backfill_id",
        "run_tags": "run_id key value",
    }
    texts = {"run_id", "event", "partition", "run_body", "value"}
    for table, names in columns.items():
        url = events_url if table in ("event_logs", "dynamic_partitions") else runs_url
        key = "partition = :image_id" if table == "dynamic_partitions" else "run_id = :run_id"
        values = [text.format(name) if name in texts else name for name in names.split()]
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            series = SERIES_BETWEEN[engine.dialect.name]
            connection.execute(
                sa.text(
                    f"INSERT INTO {table} ({', '.join(names.split())}) {series} "
                    f"SELECT {', '.join(values)} FROM {table}, made WHERE {key}"
                ),
                made,
            )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"ANALYZE {table}")
        engine.dispose()
