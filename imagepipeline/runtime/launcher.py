"""How Dagster hands runs to the workers: dagster-celery's launcher, with two of its answers changed.

`dagster.yaml` names this class; the daemon launches with it, the webserver cancels with it.
"""

import functools

import dagster_celery.launcher
from celery import states
from celery.result import AsyncResult
from dagster import DagsterRun
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_celery.launcher import CeleryRunLauncher
from dagster_celery.tags import DAGSTER_CELERY_TASK_ID_TAG as TASK_ID_TAG
from dagster_celery.tasks import create_execute_job_task

# As shipped, each launch registers the task once more, with a warning and a little memory that is never given back.
vars(dagster_celery.launcher)["create_execute_job_task"] = functools.cache(create_execute_job_task)


class RunLauncher(CeleryRunLauncher):
    """Runs as Celery tasks, whose recovery is the reconciler's."""

    @property
    def supports_resume_run(self) -> bool:
        """False: to resume runs would be a second owner of recovery."""
        return False

    def terminate(self, run_id: str) -> bool:
        """Cancels a run, and tells Dagster first: without that, the run takes the signal for a crash."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished or TASK_ID_TAG not in run.tags:
            return False
        self._instance.report_run_canceling(run)
        self._find_result(run).revoke(terminate=True)
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Failed if its worker has said that the process died; else it runs, until the reconciler finds otherwise."""
        if TASK_ID_TAG in run.tags and self._find_result(run).state == states.FAILURE:
            return CheckRunHealthResult(
                WorkerStatus.FAILED, "The process that executed the run has died."
            )
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def get_run_worker_debug_info(
        self, run: DagsterRun, include_container_logs: bool | None = True
    ) -> None:
        """None: what Celery knows of a run that did not start is that it waits."""

    def _find_result(self, run: DagsterRun) -> AsyncResult:
        return self.celery.AsyncResult(run.tags[TASK_ID_TAG])
