// Runs a table of kernel calls as one parallel region: phases of calls that do not depend on each other, each phase cut
// into tasks that whichever thread is free takes. A phase ends when its tasks are done, not when every thread has come
// by, so a core that another process takes away holds up at most the one task it had begun.
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

#include "step.h"

namespace infercomp {
namespace {

struct Call {
    const Kernel* kernel;
    std::vector<int64_t> operands;  // positions in the table of base pointers
    std::vector<int64_t> symbols;   // positions in the table of sizes
    std::vector<void*> pointers;    // resolved for the step in progress
    std::vector<int64_t> sizes;
    int64_t num_tasks = 0;
    std::atomic<int64_t> nanoseconds{0};
};

// `ticket` holds the step's number above and the next task below, so that a thread that overslept a step cannot take
// a task of the next one with the last one's phase.
struct alignas(64) Phase {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> num_done{0};
    int64_t num_tasks = 0;
    int64_t first_call = 0, last_call = 0;
};

constexpr uint64_t CLOSED = 0xffffffffu;

struct Step {
    std::vector<std::unique_ptr<Call>> calls;
    std::vector<std::unique_ptr<Phase>> phases;
    Errors errors;
    uint64_t number = 0;
    bool is_timed = false;
};

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr int64_t SPINS_BEFORE_YIELD = 300;

void run_task(Step& step, Phase& phase, int64_t task) {
    int64_t position = phase.first_call;
    while (task >= step.calls[position]->num_tasks) task -= step.calls[position++]->num_tasks;
    Call& call = *step.calls[position];
    const int64_t start = step.is_timed ? now() : 0;
    call.kernel->run(call.pointers.data(), call.sizes.data(), task, step.errors);
    if (step.is_timed) call.nanoseconds.fetch_add(now() - start, std::memory_order_relaxed);
}

// False once the step is over for everybody.
bool work_on(Step& step, Phase& phase, uint64_t number) {
    while (true) {
        uint64_t ticket = phase.ticket.load(std::memory_order_acquire);
        if (ticket >> 32 != number) return false;
        const int64_t task = int64_t(ticket & 0xffffffffu);
        if (task >= phase.num_tasks) return true;
        if (!phase.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        run_task(step, phase, task);
        phase.num_done.fetch_add(1, std::memory_order_acq_rel);
    }
}

bool wait_for(Phase& phase, uint64_t number) {
    for (int64_t spins = 0; phase.num_done.load(std::memory_order_acquire) < phase.num_tasks; ++spins) {
        if (phase.ticket.load(std::memory_order_acquire) >> 32 != number) return false;
        if (spins < SPINS_BEFORE_YIELD) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
    return true;
}

void run_phases(Step& step, uint64_t number) {
    for (auto& phase : step.phases) {
        if (!work_on(step, *phase, number) || !wait_for(*phase, number)) return;
    }
}

// Threads that wait for steps; one team serves every program of the process.
class Team {
public:
    void run(Step& step, int num_threads) {
        std::lock_guard<std::mutex> one_step_at_a_time(steps_);
        start_threads(num_threads - 1);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            current_ = &step;
            number_ = step.number;
            num_wanted_ = num_threads - 1;
            generation_.fetch_add(1, std::memory_order_release);
        }
        if (num_sleeping_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        run_phases(step, step.number);
        // A thread that overslept may still look at this step; nobody waits for it here.
        std::lock_guard<std::mutex> guard(mutex_);
        current_ = nullptr;
    }

    // Returns when no thread looks at any step: its memory may go.
    void wait_until_idle() {
        std::unique_lock<std::mutex> guard(mutex_);
        idle_.wait(guard, [this] { return num_inside_ == 0; });
    }

private:
    void start_threads(int wanted) {
        if (owner_ != getpid()) {  // a forked child has the object but not the threads
            new (&threads_) std::vector<std::thread>();
            owner_ = getpid();
            num_inside_ = 0;
            num_sleeping_ = 0;
        }
        while (int(threads_.size()) < wanted) {
            const int index = int(threads_.size());
            threads_.emplace_back([this, index] { serve(index); });
            threads_.back().detach();
        }
    }

    void serve(int index) {
        uint64_t seen = 0;
        while (true) {
            wait_for_step(seen);
            Step* step;
            uint64_t number;
            {
                std::lock_guard<std::mutex> guard(mutex_);
                seen = generation_.load(std::memory_order_acquire);
                if (current_ == nullptr || index >= num_wanted_) continue;
                step = current_;
                number = number_;
                ++num_inside_;
            }
            run_phases(*step, number);
            std::lock_guard<std::mutex> guard(mutex_);
            if (--num_inside_ == 0) idle_.notify_all();
        }
    }

    void wait_for_step(uint64_t seen) {
        for (int64_t spins = 0; spins < 2000; ++spins) {
            if (generation_.load(std::memory_order_acquire) != seen) return;
            pause();
        }
        std::unique_lock<std::mutex> guard(mutex_);
        num_sleeping_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(guard, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        num_sleeping_.fetch_sub(1, std::memory_order_acq_rel);
    }

    std::mutex steps_, mutex_;
    std::condition_variable wake_, idle_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> num_sleeping_{0};
    std::vector<std::thread> threads_;
    Step* current_ = nullptr;
    uint64_t number_ = 0;
    int num_inside_ = 0, num_wanted_ = 0;
    pid_t owner_ = getpid();
};

Team& team() {
    // Never destroyed: its threads outlive every static object.
    static Team* instance = new Team();
    return *instance;
}

}  // namespace
}  // namespace infercomp

using namespace infercomp;

extern "C" {

void* infercomp_step_new() { return new Step(); }

void infercomp_step_delete(void* step) {
    team().wait_until_idle();
    delete static_cast<Step*>(step);
}

// Calls are added in the order of their phases; a phase's number is never below the one before.
void infercomp_step_add(void* handle, const void* kernel, int64_t phase, const int64_t* operands, int64_t num_operands,
                        const int64_t* symbols, int64_t num_symbols) {
    Step& step = *static_cast<Step*>(handle);
    auto call = std::make_unique<Call>();
    call->kernel = static_cast<const Kernel*>(kernel);
    call->operands.assign(operands, operands + num_operands);
    call->symbols.assign(symbols, symbols + num_symbols);
    call->pointers.resize(num_operands);
    call->sizes.resize(num_symbols);
    step.calls.push_back(std::move(call));
    const int64_t end = int64_t(step.calls.size());
    if (int64_t(step.phases.size()) <= phase) {
        step.phases.push_back(std::make_unique<Phase>());
        step.phases.back()->first_call = end - 1;
    }
    step.phases.back()->last_call = end;
}

// Returns how many indices were out of range.
int64_t infercomp_step_run(void* handle, void* const* pointers, const int64_t* sizes, int num_threads, int is_timed) {
    Step& step = *static_cast<Step*>(handle);
    // Nobody may take a task while the counts change.
    for (auto& phase : step.phases) phase->ticket.store(CLOSED << 32, std::memory_order_release);
    step.number = (step.number + 1) % CLOSED;
    step.is_timed = is_timed != 0;
    step.errors.index_out_of_range.store(0);
    for (auto& phase : step.phases) {
        int64_t num_tasks = 0;
        for (int64_t position = phase->first_call; position < phase->last_call; ++position) {
            Call& call = *step.calls[position];
            for (size_t i = 0; i < call.operands.size(); ++i) call.pointers[i] = pointers[call.operands[i]];
            for (size_t i = 0; i < call.symbols.size(); ++i) call.sizes[i] = sizes[call.symbols[i]];
            call.num_tasks = call.kernel->num_tasks(call.pointers.data(), call.sizes.data());
            num_tasks += call.num_tasks;
        }
        phase->num_tasks = num_tasks;
        phase->num_done.store(0, std::memory_order_relaxed);
        phase->ticket.store(uint64_t(step.number) << 32, std::memory_order_release);
    }
    if (num_threads > 1) {
        team().run(step, num_threads);
    } else {
        run_phases(step, step.number);
    }
    return step.errors.index_out_of_range.load();
}

int64_t infercomp_step_nanoseconds(void* handle, int64_t call) {
    return static_cast<Step*>(handle)->calls[call]->nanoseconds.exchange(0);
}

}  // extern "C"
