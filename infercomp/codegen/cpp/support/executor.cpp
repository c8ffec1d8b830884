// Runs a table of kernel calls as one parallel region: phases of calls that do not depend on each other, each phase cut
// into tasks. Each thread has a range of neighbouring tasks, whose weights are one sequential stream, and takes from the
// end of the others' ranges when its own is empty. A phase ends when its tasks are done, not when every thread has come
// by, so a core that another process takes away holds up at most the one task it had begun.
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

#include "step.h"

namespace infercomp {
namespace {

// A call's operands and sizes are parts of the step's tables, one after the other: a step reads them all once more after
// its weights have flushed the caches.
struct Call {
    const Kernel* kernel;
    int64_t first_operand, first_symbol;
    int64_t num_tasks = 0;
    std::atomic<int64_t> nanoseconds{0};
};

// Tasks that are left of a thread's part of a phase, with the step's number, so that a thread that overslept a step
// cannot take a task of the next one with the last one's phase.
class Range {
public:
    void open(uint64_t number, int64_t begin, int64_t end) {
        state_.store(packed(number, begin, end), std::memory_order_release);
    }

    void close() { open(CLOSED, 0, 0); }

    bool is_of(uint64_t number) const { return number_of(state_.load(std::memory_order_acquire)) == number; }

    // The first task for the owner, the last for others; -1 where none is left.
    int64_t take(uint64_t number, bool is_owner) {
        uint64_t state = state_.load(std::memory_order_acquire);
        while (true) {
            const int64_t begin = begin_of(state), end = end_of(state);
            if (number_of(state) != number || begin >= end) return -1;
            const uint64_t rest = is_owner ? packed(number, begin + 1, end) : packed(number, begin, end - 1);
            if (state_.compare_exchange_weak(state, rest, std::memory_order_acq_rel)) return is_owner ? begin : end - 1;
        }
    }

    static constexpr int BITS = 22;
    static constexpr int64_t MAX_TASKS = (int64_t(1) << BITS) - 1;
    static constexpr uint64_t CLOSED = (uint64_t(1) << (64 - 2 * BITS)) - 1;

private:
    static uint64_t packed(uint64_t number, int64_t begin, int64_t end) {
        return number << (2 * BITS) | uint64_t(begin) << BITS | uint64_t(end);
    }
    static uint64_t number_of(uint64_t state) { return state >> (2 * BITS); }
    static int64_t begin_of(uint64_t state) { return int64_t(state >> BITS) & MAX_TASKS; }
    static int64_t end_of(uint64_t state) { return int64_t(state) & MAX_TASKS; }

    alignas(64) std::atomic<uint64_t> state_{CLOSED << (2 * BITS)};
};

struct alignas(64) Phase {
    Range* ranges = nullptr;  // one a thread
    int64_t num_ranges = 0;
    std::atomic<int64_t> num_done{0};
    int64_t num_tasks = 0;
    int64_t first_call = 0, last_call = 0;

    bool is_of(uint64_t number) const { return ranges[0].is_of(number); }

    void close() {
        for (int64_t i = 0; i < num_ranges; ++i) ranges[i].close();
    }

    void open(uint64_t number) {
        num_done.store(0, std::memory_order_relaxed);
        for (int64_t i = 0; i < num_ranges; ++i) {
            ranges[i].open(number, num_tasks * i / num_ranges, num_tasks * (i + 1) / num_ranges);
        }
    }

    // -1 where none is left.
    int64_t take(uint64_t number, int64_t thread) {
        for (int64_t distance = 0; distance < num_ranges; ++distance) {
            const int64_t task = ranges[(thread + distance) % num_ranges].take(number, distance == 0);
            if (task >= 0) return task;
        }
        return -1;
    }
};

struct Step {
    std::deque<Call> calls;
    std::deque<Phase> phases;
    std::vector<int64_t> operands;  // of all calls: positions in the table of base pointers
    std::vector<int64_t> symbols;   // of all calls: positions in the table of sizes
    std::vector<void*> pointers;    // both resolved for the step in progress
    std::vector<int64_t> sizes;
    std::unique_ptr<Range[]> ranges;  // of all phases, side by side: each step writes them all
    Errors errors;
    uint64_t number = 0;
    int num_threads = 0;
    bool is_timed = false;
    bool is_counted = false;

    void* const* pointers_of(const Call& call) const { return pointers.data() + call.first_operand; }
    const int64_t* sizes_of(const Call& call) const { return sizes.data() + call.first_symbol; }
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
// So long a thread stays ready for the next step: to wake it takes longer than what is done between two steps.
constexpr int64_t READY_NANOSECONDS = 5'000'000;

void run_task(Step& step, Phase& phase, int64_t task) {
    int64_t position = phase.first_call;
    while (task >= step.calls[position].num_tasks) task -= step.calls[position++].num_tasks;
    Call& call = step.calls[position];
    const int64_t start = step.is_timed ? now() : 0;
    call.kernel->run(step.pointers_of(call), step.sizes_of(call), task, step.errors);
    if (step.is_timed) call.nanoseconds.fetch_add(now() - start, std::memory_order_relaxed);
}

// False once the step is over for everybody.
bool work_on(Step& step, Phase& phase, uint64_t number, int64_t thread) {
    for (int64_t task; (task = phase.take(number, thread)) >= 0;) {
        run_task(step, phase, task);
        phase.num_done.fetch_add(1, std::memory_order_acq_rel);
    }
    return phase.is_of(number);
}

// A thread with nothing to do brings the weights of its next product closer: memory would be idle otherwise.
class Ahead {
public:
    Ahead(const Step& step, int64_t thread) : step_(step), thread_(thread) {}

    // Called again and again while phase `current` is waited for; false if there is nothing to bring.
    bool bring_some(size_t current) {
        if (phase_ <= current) look_for_stream(current);
        for (int line = 0; line < LINES_AT_ONCE && next_ < end_; ++line, next_ += 64) {
            __builtin_prefetch(next_, 0, 2);
            if (to_second_ != 0) __builtin_prefetch(next_ + to_second_, 0, 2);
        }
        return next_ < end_;
    }

private:
    static constexpr int LINES_AT_ONCE = 4;
    static constexpr size_t PHASES_AHEAD = 4;
    // A part of the second-level cache.
    static constexpr int64_t MAX_BYTES = 1 << 17;

    void look_for_stream(size_t current) {
        const size_t last = std::min(current + PHASES_AHEAD, step_.phases.size() - 1);
        next_ = end_ = nullptr;
        for (phase_ = current + 1; phase_ <= last; ++phase_) {
            const Phase& phase = step_.phases[phase_];
            const Call& call = step_.calls[phase.first_call];
            const int64_t task = phase.num_tasks * thread_ / phase.num_ranges;
            if (call.kernel->stream == nullptr || task >= call.num_tasks) continue;
            const Stream stream = call.kernel->stream(step_.pointers_of(call), step_.sizes_of(call), task);
            next_ = static_cast<const char*>(stream.start);
            to_second_ = stream.bytes_to_second;
            const int64_t most_bytes = to_second_ != 0 ? std::min(MAX_BYTES / 2, to_second_) : MAX_BYTES;
            end_ = next_ + std::min(most_bytes, stream.num_bytes * (call.num_tasks - task));
            return;
        }
    }

    const Step& step_;
    const int64_t thread_;
    size_t phase_ = 0;
    const char* next_ = nullptr;
    const char* end_ = nullptr;
    int64_t to_second_ = 0;
};

bool wait_for(Step& step, size_t current, uint64_t number, Ahead& ahead) {
    const Phase& phase = step.phases[current];
    for (int64_t spins = 0; phase.num_done.load(std::memory_order_acquire) < phase.num_tasks; ++spins) {
        if (!phase.is_of(number)) return false;
        if (spins >= SPINS_BEFORE_YIELD) {
            std::this_thread::yield();
        } else if (!ahead.bring_some(current)) {
            pause();
        }
    }
    return true;
}

void run_phases(Step& step, uint64_t number, int64_t thread) {
    Ahead ahead(step, thread);
    for (size_t i = 0; i < step.phases.size(); ++i) {
        if (!work_on(step, step.phases[i], number, thread) || !wait_for(step, i, number, ahead)) return;
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
        run_phases(step, step.number, 0);
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
            run_phases(*step, number, index + 1);
            std::lock_guard<std::mutex> guard(mutex_);
            if (--num_inside_ == 0) idle_.notify_all();
        }
    }

    void wait_for_step(uint64_t seen) {
        const int64_t end = now() + READY_NANOSECONDS;
        for (int64_t spins = 0; spins < 2000 || now() < end; ++spins) {
            if (generation_.load(std::memory_order_acquire) != seen) return;
            spins < 2000 ? pause() : std::this_thread::yield();
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

void set_num_threads(Step& step, int num_threads) {
    if (step.num_threads == num_threads) return;
    // A thread that overslept may still look at the ranges.
    team().wait_until_idle();
    step.num_threads = num_threads;
    step.ranges = std::make_unique<Range[]>(step.phases.size() * num_threads);
    Range* next = step.ranges.get();
    for (Phase& phase : step.phases) {
        phase.ranges = next;
        phase.num_ranges = num_threads;
        next += num_threads;
    }
}

bool has_counts_of(const Step& step, const int64_t* sizes, int num_threads) {
    if (!step.is_counted || step.num_threads != num_threads) return false;
    for (size_t i = 0; i < step.symbols.size(); ++i) {
        if (step.sizes[i] != sizes[step.symbols[i]]) return false;
    }
    return true;
}

// Finds how many tasks each call has, which follows from the sizes alone; false if some phase has too many.
bool count_tasks(Step& step, const int64_t* sizes, int num_threads) {
    // Nobody may take a task while the counts change.
    for (int64_t i = 0; step.ranges && i < int64_t(step.phases.size()); ++i) step.phases[i].close();
    step.is_counted = false;
    set_num_threads(step, num_threads);
    for (size_t i = 0; i < step.symbols.size(); ++i) step.sizes[i] = sizes[step.symbols[i]];
    for (Call& call : step.calls) call.num_tasks = call.kernel->num_tasks(step.pointers_of(call), step.sizes_of(call));
    for (Phase& phase : step.phases) {
        int64_t num_tasks = 0;
        for (int64_t i = phase.first_call; i < phase.last_call; ++i) num_tasks += step.calls[i].num_tasks;
        if (num_tasks > Range::MAX_TASKS) return false;
        phase.num_tasks = num_tasks;
    }
    step.is_counted = true;
    return true;
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
    Call& call = step.calls.emplace_back();
    call.kernel = static_cast<const Kernel*>(kernel);
    call.first_operand = int64_t(step.operands.size());
    call.first_symbol = int64_t(step.symbols.size());
    step.operands.insert(step.operands.end(), operands, operands + num_operands);
    step.symbols.insert(step.symbols.end(), symbols, symbols + num_symbols);
    step.pointers.resize(step.operands.size());
    step.sizes.resize(step.symbols.size());
    const int64_t end = int64_t(step.calls.size());
    if (int64_t(step.phases.size()) <= phase) step.phases.emplace_back().first_call = end - 1;
    step.phases.back().last_call = end;
}

// Returns how many indices were out of range, or -1 where a phase has more tasks than can be counted.
int64_t infercomp_step_run(void* handle, void* const* pointers, const int64_t* sizes, int num_threads, int is_timed) {
    Step& step = *static_cast<Step*>(handle);
    if (!has_counts_of(step, sizes, num_threads) && !count_tasks(step, sizes, num_threads)) return -1;
    step.number = (step.number + 1) % Range::CLOSED;
    step.is_timed = is_timed != 0;
    step.errors.index_out_of_range.store(0);
    for (size_t i = 0; i < step.operands.size(); ++i) step.pointers[i] = pointers[step.operands[i]];
    for (Phase& phase : step.phases) phase.open(step.number);
    if (num_threads > 1) {
        team().run(step, num_threads);
    } else {
        run_phases(step, step.number, 0);
    }
    return step.errors.index_out_of_range.load();
}

int64_t infercomp_step_nanoseconds(void* handle, int64_t call) {
    return static_cast<Step*>(handle)->calls[call].nanoseconds.exchange(0);
}

}  // extern "C"
