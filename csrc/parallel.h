// Parallel loops on torch's own thread pool: it obeys torch.set_num_threads, and there is no second OpenMP runtime.
//
// libtorch_cpu exports a plain C function, torch_parallel_for (torch >= 2.10, torch/csrc/stable/c/shim.h). Python hands
// its address over at import, so nothing is linked and one build serves every torch.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastgpt {

struct ThreadPool {
    // (begin, end, grain, body, context) -> 0 on success; body(begin, end, context) gets parts of [begin, end)
    int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) = nullptr;
    int32_t (*num_threads)(uint32_t*) = nullptr;
};
extern ThreadPool pool; // bindings.cpp

inline int num_threads() {
    uint32_t n = 1;
    if (pool.num_threads) pool.num_threads(&n);
    return n < 1 ? 1 : int(n);
}

// body(task, worker) for each task in [0, tasks), by at most `workers` threads at once; worker < workers tells which, for
// scratch memory. Threads take the next task as they finish one, so unequal tasks even out. Which thread runs a task
// must not matter for its result: then the bits are the same for any number of threads. `body` must not throw.
template <class Body> void parallel_tasks(int64_t tasks, int workers, const Body& body) {
    struct Context {
        const Body& body;
        int64_t tasks, next;
        static void run(int64_t worker, int64_t, void* context) {
            auto& c = *static_cast<Context*>(context);
            for (int64_t task; (task = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) < c.tasks;)
                c.body(task, int(worker));
        }
    } context{body, tasks, 0};
    if (workers > 1 && tasks > 1 && pool.parallel_for) {
        // a range of several workers may arrive as one: then its first does all the tasks that are left
        pool.parallel_for(0, workers < tasks ? workers : tasks, 1, &Context::run, &context);
    }
    Context::run(0, 1, &context); // all of it without a pool; nothing is left with one
}

template <class Body> void parallel_tasks(int64_t tasks, const Body& body) {
    parallel_tasks(tasks, num_threads(), [&](int64_t task, int) { body(task); });
}

// Memory for a kernel's intermediate values, aligned to a cache line, one part per worker.
template <class T> class Scratch {
  public:
    Scratch(int64_t parts, int64_t values) : values_((values * int64_t(sizeof(T)) + 63) / 64 * 64 / int64_t(sizeof(T))) {
        if (posix_memalign(reinterpret_cast<void**>(&memory_), 64, size_t(parts * values_) * sizeof(T) + 64))
            throw std::bad_alloc();
    }
    ~Scratch() { free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* part(int64_t i) const { return memory_ + i * values_; }

  private:
    T* memory_;
    int64_t values_;
};

} // namespace fastgpt
