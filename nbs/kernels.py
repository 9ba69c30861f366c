"""Kernels for the tests, forked from a process that has done the slow imports: each is new, and starts in a moment.

Torch, transformers and vLLM take up to eight seconds of processor time to import, and most notebooks need one of them.
"""
import atexit
import multiprocessing
import os

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ipykernel.kernelapp", "seaborn", "transformers.models.auto.modeling_auto",
                              "vllm.v1.core.sched.async_scheduler"])  # what is not installed is left out


class Kernel(FORKS.Process):
    "The process of one kernel, with the methods of a Popen that Jupyter calls."
    stdin = stdout = stderr = None

    def __init__(self, cmd, env, cwd):
        super().__init__()
        self.cmd, self.env, self.cwd = cmd, env, cwd

    def run(self):
        from ipykernel.kernelapp import launch_new_instance

        os.setsid()
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(self.cwd)
        launch_new_instance(argv=self.cmd[self.cmd.index("-f"):])
        atexit._run_exitfuncs()  # as at the end of any Python

    def poll(self):
        return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


class Forked(LocalProvisioner):
    "Starts a kernel by a fork, and keeps everything else of Jupyter's way."

    async def launch_kernel(self, cmd, *, env, cwd, **kw):
        self.process = Kernel(cmd, env, cwd)
        self.process.start()
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class Forks(AsyncKernelManager):
    "The manager of such a kernel."

    def __init__(self, **kw):
        super().__init__(**kw)
        self.provisioner = Forked(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
