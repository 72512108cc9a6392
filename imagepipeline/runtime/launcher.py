"""The run launcher, which hands runs to the workers: dagster-celery's launcher with our recovery.

`dagster.yaml` names this class. The daemon launches runs with it, and the webserver cancels them.
"""

from celery import states
from celery.result import AsyncResult
from dagster import DagsterRun
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster_celery.config import TASK_EXECUTE_JOB_NAME
from dagster_celery.launcher import CeleryRunLauncher


class RunLauncher(CeleryRunLauncher):
    """Launches runs as Celery tasks and leaves recovery to the reconciler."""

    def launch_run(self, context: LaunchRunContext) -> None:
        """Sends a task, which any worker may take.

        It has the run's ID. dagster-celery lets Celery choose one, and stores it in a tag after the
        task was sent: until then, a run that has begun could not be cancelled, and the tags that
        the run itself sets could be lost.
        """
        run_id = context.dagster_run.run_id
        self.celery.send_task(TASK_EXECUTE_JOB_NAME, (run_id,), task_id=run_id, ignore_result=True)

    @property
    def supports_resume_run(self) -> bool:
        """Always False: the reconciler must be the only owner of recovery."""
        return False

    def terminate(self, run_id: str) -> bool:
        """Cancels a run and returns whether it could be cancelled.

        Dagster is told first; otherwise the run would record the signal as a crash.
        """
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        self._find_result(run_id).revoke(terminate=True)
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Returns FAILED if the run's worker reported that its process died, and else RUNNING.

        All other losses are found by the reconciler.
        """
        if self._find_result(run.run_id).state == states.FAILURE:
            return CheckRunHealthResult(
                WorkerStatus.FAILED, "The process that executed the run died."
            )
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def get_run_worker_debug_info(
        self, run: DagsterRun, include_container_logs: bool | None = True
    ) -> None:
        """Returns None: all that Celery knows about a run that has not started is that it waits."""

    def _find_result(self, run_id: str) -> AsyncResult:
        return self.celery.AsyncResult(run_id)
